"""Multiply-adds of what SWAG's models do not have, each as the difference to one without it."""

import dataclasses

import pytest

import hvit_jax
from hvit_jax.config import Decoder, Rope
from hvit_jax.models.reducer import Reducer
from hvit_jax.reducers import ATS

# 6 patches; with CLS 7 tokens of 8 channels, 2 heads of 4, an MLP of 12, 3 blocks.
PLAIN = hvit_jax.ViTConfig((2, 3), 1, depth=3, width=8, heads=2, mlp_width=12)
P, N, C, M, BLOCKS = 6, 7, 8, 12, 3


def count(config, method=Reducer()):
    return hvit_jax.count_flops(config, method)


@pytest.mark.parametrize(
    ("switches", "difference"),
    [
        ({"layer_scale": True}, BLOCKS * 2 * N * C),
        # 3 an element of q and of k; CLS does not turn.
        ({"rope": Rope((1.0,))}, BLOCKS * 2 * 3 * P * C),
        ({"pre_norm": True}, 4 * N * C),
        ({"final_norm": False}, -4 * N * C),
        ({"pooled_norm": True}, 4 * C),
        ({"patch_bias": False}, 0),
        ({"qkv_bias": "qv"}, -BLOCKS * N * C),
        ({"qkv_bias": "none"}, -BLOCKS * 3 * N * C),
        ({"qk_norm": True}, BLOCKS * 2 * 4 * N * C),
        # A third linear layer, and the product.
        ({"gated": True, "activation": "silu"}, BLOCKS * (N * (C + 1) * M + N * M)),
        ({"mlp_norm": True}, BLOCKS * 4 * N * M),
        ({"position_embedding": False}, -N * C),
        ({"pool": "avg"}, 0),
        ({"pool": "cls+avg"}, C * 1000),
        ({"num_classes": 0, "projection": 5}, C * 5 - (C + 1) * 1000),
    ],
    ids=str,
)
def test_difference_to_swags(switches, difference):
    found = count(dataclasses.replace(PLAIN, **switches))
    assert found - count(PLAIN) == difference


def test_blocks_of_a_mask_transformer():
    """Each adds as much, the first one to a decoder that has none too."""

    def of(depth):
        decoder = Decoder("mask", 5, depth=depth, heads=2)
        return count(dataclasses.replace(PLAIN, num_classes=0, decoder=decoder))

    tokens, hidden = P + 5, 4 * C
    attention = 4 * tokens * (C + 1) * C + tokens * C + 2 * tokens**2 * C + 5 * 2 * tokens**2
    mlp = tokens * ((C + 1) * hidden + (hidden + 1) * C + 2 * hidden)
    # Two norms, two dropouts and two residuals.
    block = attention + mlp + tokens * (2 * 4 + 2 + 2) * C
    assert [of(depth) - of(0) for depth in (1, 3)] == [block, 3 * block]


@pytest.mark.parametrize("everything", [False, True])
def test_attention_pool(everything):
    """k and v of all tokens, one query, the rest on one token."""
    switches = {"pool": "map", "pool_heads": 4, "pool_mlp_width": 10, "pool_prefix": everything}
    seen = N if everything else P
    products = (C + 1) * C + 2 * seen * (C + 1) * C + (C + 1) * C
    core = C + 2 * seen * C + 5 * 4 * seen
    mlp = 4 * C + (C + 1) * 10 + 10 + (10 + 1) * C + C
    found = count(dataclasses.replace(PLAIN, **switches))
    assert found - count(PLAIN) == products + core + mlp


def test_registers_are_tokens_like_cls():
    """Each goes through all blocks, norms and positions' sum as CLS does."""
    one, two, three = (
        count(dataclasses.replace(PLAIN, registers=registers)) for registers in (1, 2, 3)
    )
    # Second differences are the attention matrix's: two products and a softmax.
    assert three - 2 * two + one == BLOCKS * 2 * (2 * C + 5 * 2)


def test_scores_without_cls_are_means_over_the_matrix():
    """ATS, which keeps all rows here, reads CLS's row of the matrix, or averages all rows."""
    without = dataclasses.replace(PLAIN, class_token=False, position_prefix=0, pool="avg")
    for config, extra in ((PLAIN, 0), (without, P * P)):
        assert count(config, ATS(blocks=(1,))) - count(config) == extra
