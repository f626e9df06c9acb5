import functools

import pytest

from hvit_jax.convert import convert_file
from tests.dense_golden import DenseGoldens


@pytest.fixture(scope="session")
def dense_goldens():
    return DenseGoldens()


@pytest.fixture(scope="session")
def dense_checkpoint(dense_goldens, tmp_path_factory):
    """Gives the checkpoint that a golden configuration runs: its net, as its code runs it."""

    @functools.cache
    def converted(net, norm_eps, rule):
        directory = tmp_path_factory.mktemp(net) / "checkpoint"
        folder = dense_goldens.folder / net
        convert_file(folder, directory, norm_eps=norm_eps, position_resizing=rule)
        return directory

    def checkpoint(config):
        about = dense_goldens.description["configs"][config]
        about = dense_goldens.description["configs"][about.get("like", config)]
        return converted(about["net"], about["ln_eps"], about["pos_resize"])

    return checkpoint
