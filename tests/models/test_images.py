"""What a model takes: normalised pictures, nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError

CONFIG = hvit_jax.ViTConfig(8, patch_size=4, depth=2, width=8, heads=2, mlp_width=8, num_classes=3)


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize("output", ["__call__", "classify", "features", "dense_features", "jit"])
def test_pixels_that_are_not_normalised_are_refused(dtype, output):
    model, pixels = hvit_jax.create(CONFIG), jnp.ones((1, 8, 8, 3), dtype)
    run = hvit_jax.jit_model(model) if output == "jit" else getattr(model, output)
    with pytest.raises(
        InputError, match=rf"got {dtype}; make them .* hvit_jax.normalize\(pixels, mean, std\)"
    ):
        run(pixels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_normalised_pictures_of_any_floating_type(dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    images = hvit_jax.normalize(pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    np.testing.assert_allclose(images, pixels / 127.5 - 1, atol=1e-6)
    assert hvit_jax.create(CONFIG)(images.astype(dtype)).shape == (2, 3)
