"""What heads read of the blocks: taps, normalised for segments only, on the full grid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax.config import Decoder
from hvit_jax.models.decoders import Tap
from hvit_jax.ops.resizing import resize_map

REDUCED = {"cluster_location": 1, "num_clusters": 4}


@pytest.mark.parametrize(
    ("kind", "normed", "method", "options"),
    [
        ("bn_linear", True, "dense", {}),
        ("depth_linear", False, "hourglass", REDUCED),
    ],
)
def test_taps_are_read_behind_their_blocks(kind, normed, method, options):
    decoder = Decoder(kind, 5, taps=(0, 2))
    config = hvit_jax.ViTConfig(
        (56, 42), 14, 3, 16, 2, 32, num_classes=0, registers=2, decoder=decoder
    )
    model = hvit_jax.create(config, method, **options)
    images = jax.random.normal(jax.random.key(0), (2, 56, 42, 3))
    seen = hvit_jax.jit_model(model).features(images)

    @jax.jit
    def read(tokens, states):
        taps = []
        for tap in decoder.taps:
            x = model.ln(tokens[tap]) if normed else tokens[tap]
            patches = model.reducer.restore(x, states[tap])
            taps.append(Tap(patches.reshape(2, 4, 3, 16), x[:, 0]))
        return resize_map(model.decoder(taps), (56, 42))

    np.testing.assert_allclose(seen.output, read(seen.tokens, seen.states), atol=2e-5)
    assert jnp.ptp(seen.output) > 1e-3


@pytest.mark.parametrize("restore", ["masks", "block"])
def test_a_method_that_keeps_the_grid_needs_no_place_for_its_return(restore):
    """Maps are compared with the dense model's, wherever a checkpoint restores them."""
    decoder = Decoder("linear", 5, restore=restore)
    config = hvit_jax.ViTConfig(28, 14, 3, 16, 2, 32, num_classes=0, decoder=decoder)
    images = jax.random.normal(jax.random.key(0), (1, 28, 28, 3))
    plain = dataclasses.replace(config, decoder=dataclasses.replace(decoder, restore=None))
    models = (hvit_jax.create(each) for each in (config, plain))
    found, expected = (hvit_jax.jit_model(model)(images) for model in models)
    np.testing.assert_array_equal(found, expected)
    hvit_jax.create(config, "tome_dense")
    with pytest.raises(hvit_jax.InputError, match=f"restore.*{restore}"):
        hvit_jax.create(config, "evit")


def test_restore_is_for_maps(tmp_path, golden_checkpoint):
    with pytest.raises(hvit_jax.InputError, match="restore='tokens' is for models with a decoder"):
        hvit_jax.load(golden_checkpoint, restore="tokens")
