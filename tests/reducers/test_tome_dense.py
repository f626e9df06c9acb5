"""ToMe for dense prediction: what a block does, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from hvit_jax.config import Compute, Rope, ViTConfig
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import TokenState
from hvit_jax.ops.matching import match_tokens
from hvit_jax.reducers.tome_dense import ToMeDense

SIZES = {"resolution": 16, "patch_size": 4, "depth": 1, "width": 16, "heads": 2, "mlp_width": 32}


def test_a_block_by_hand():
    config = ViTConfig(**SIZES)
    block = Block(config, compute=Compute(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 17, 16))
    reducer = ToMeDense(r=0.3)
    (layer,) = reducer.schedule(config)
    assert (layer.merged, layer.tokens_out) == (5, 17)
    out, _ = reducer.block(block, x, TokenState(None, None, None, 1), layer, None)

    def through(y, function):
        places = np.asarray(match_tokens(y, r=5).places)
        results = []
        for image, place in zip(np.asarray(y), places, strict=True):
            means = np.stack([image[place == token].mean(0) for token in range(12)])
            results.append(np.asarray(function(jnp.asarray(means)[None]))[0][place])
        return np.stack(results)

    def attention(y):
        return block.project(block.attend(*block.project_qkv(y)))

    expected = x + through(block.ln_1(x), attention)
    expected = expected + through(block.ln_2(expected), block.run_mlp)
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_at_most_half_of_the_patches_merge():
    config = ViTConfig(**SIZES)
    assert ToMeDense(r=0.9).schedule(config)[0].merged == 8
    with pytest.raises(hvit_jax.InputError, match="below 1"):
        ToMeDense(r=1.0).resolve(config)


@pytest.mark.parametrize("registers", (0, 1, 4))
def test_tokens_before_the_patches_never_merge(registers):
    """Equal patches merge with each other; a prefix that is like them does not join."""
    config = ViTConfig(
        **SIZES, registers=registers, position_embedding=False, rope=Rope.spaced(8), num_classes=0
    )
    model = hvit_jax.create(config, "tome_dense", r=0.5)
    dense = hvit_jax.create(config)
    images = jnp.ones((1, 16, 16, 3)) * jnp.arange(3)
    merged, whole = (each.tokens(images) for each in (model, dense))
    assert merged.keys() == whole.keys()
    for name in merged:
        assert merged[name].shape == whole[name].shape
    # All patches are the same picture, so that what merges are equal tokens at other places.
    assert np.isfinite(merged["patches"]).all()
