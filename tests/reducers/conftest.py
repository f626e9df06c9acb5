import pytest

from tests.small_models import noise


@pytest.fixture(scope="session")
def images(small_config):
    return noise(small_config)
