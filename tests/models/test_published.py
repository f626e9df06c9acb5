"""Published rows: every one is found again from its own options, and nothing else is."""

import dataclasses

import pytest

import hvit_jax
from hvit_jax.architectures import named_config
from hvit_jax.published import find_published, published_rows

ROWS = [row for row in published_rows() if row["method"] in hvit_jax.REDUCERS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['method']}-{row['model']}")
def test_every_row_is_found(row):
    reducer = hvit_jax.make_reducer(row["method"], **row["args"])
    config = dataclasses.replace(named_config(row["model"]), resolution=tuple(row["resolution"]))
    assert find_published(config, reducer) == row


def test_row_by_hand():
    reducer = hvit_jax.make_reducer("hourglass", cluster_location=8, num_clusters=256)
    row = find_published(named_config("vit_l16"), reducer)
    assert row is not None
    assert row["published"] == {"gflops": 179.0, "fps": 23.3, "throughput": 29.7, "top1": 87.2}


@pytest.mark.parametrize(
    "change", [{"resolution": 384}, {"num_classes": 10}, {"depth": 23}, {"num_classes": 0}]
)
def test_other_models_were_not_published(change):
    config = dataclasses.replace(named_config("vit_l16"), **change)
    assert find_published(config, hvit_jax.Reducer()) is None


@pytest.mark.parametrize(
    "change", [{"num_clusters": 225}, {"cluster_window": 3}, {"cluster_temperature": 0.5}]
)
def test_other_options_were_not_published(change):
    options = {"cluster_location": 8, "num_clusters": 256, **change}
    reducer = hvit_jax.make_reducer("hourglass", **options)
    assert find_published(named_config("vit_l16"), reducer) is None
