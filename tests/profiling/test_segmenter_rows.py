"""The published Segmenter rows: GFLOPs as their tables count them."""

import dataclasses

import pytest

import hvit_jax
from hvit_jax.costs import count_flops
from hvit_jax.segmenter import (
    row_gflops,
    segmenter_config,
    segmenter_method,
    segmenter_rows,
    table_gflops,
)

STATIC = [row for row in segmenter_rows() if row["method"] != "act"]


def _name(row):
    return f"{row['dataset']}-{row['method']}-{row['published']['gflops']}"


@pytest.mark.parametrize("row", STATIC, ids=_name)
def test_gflops_of_a_static_row(row):
    assert row_gflops(row) == pytest.approx(row["published"]["gflops"], abs=0.061)
    assert row_gflops(row) == pytest.approx(row["gflops_formula"], abs=5.1e-4)


def test_act_by_the_clusters_that_its_rows_imply():
    for row in segmenter_rows():
        if row["method"] == "act":
            # A budget is a whole number of at least 2, of which each costs 0.12.
            assert row_gflops(row) == pytest.approx(row["published"]["gflops"], abs=0.13)


def test_all_are_counted_in_full_too():
    """Everything costs more than what the tables' counter sees, by up to a fifth."""
    for row in segmenter_rows():
        config, reducer = segmenter_config(row["dataset"]), segmenter_method(row)
        full = count_flops(config, reducer) / 1e9
        assert 1 < full / row_gflops(row) < 1.25, _name(row)


def test_masks_are_restored_cheaper_than_tokens():
    config = segmenter_config("ade20k")
    decoder = dataclasses.replace(config.decoder, restore="tokens")
    tokens = dataclasses.replace(config, decoder=decoder)
    reducer = hvit_jax.make_reducer("hourglass", cluster_location=10, num_clusters=784)
    masks, tokens = (count_flops(each, reducer) for each in (config, tokens))
    # On 1,600 patches instead of 784, besides 150 classes, the decoder's layers cost more, and its
    # two attentions; and spreading 1,024 channels instead of 150.
    layers, attention = 816 * 25 * 1024**2, 2 * (2 * 1024 + 5 * 16) * (1750**2 - 934**2)
    spreading = 1600 * 784 * 874
    assert tokens - masks == pytest.approx(layers + attention + spreading, rel=0.04)


def test_other_models_are_refused():
    with pytest.raises(hvit_jax.InputError, match="mask transformer"):
        table_gflops(hvit_jax.MODELS["vit_b16"], hvit_jax.Reducer())
    with pytest.raises(hvit_jax.InputError, match="no rows of smyrf"):
        table_gflops(segmenter_config("ade20k"), hvit_jax.make_reducer("smyrf"))
