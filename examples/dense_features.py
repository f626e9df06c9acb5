"""Find the patches that look like a given one, with features of a dense and of a reduced model."""

import jax.numpy as jnp
import numpy as np

import hvit_jax
from hvit_jax import demo
from hvit_jax.data.picture import open_picture
from hvit_jax.data.preprocess import normalize, resize_and_crop

RESOLUTION, CUP = 128, (6, 12)  # a 32 x 32 grid; row and column of a patch on the cup's rim

picture = open_picture(demo.pictures_dir() / "coffee.jpg", "coffee.jpg", exif=True)
dense = hvit_jax.load(demo.checkpoint_dir(), resolution=RESOLUTION)
reduced = hvit_jax.load(demo.checkpoint_dir(), "tome", r=100, resolution=RESOLUTION)
how = dense.preprocessing  # as the checkpoint says
pixels = resize_and_crop(picture, dense.config.image_shape, how)
images = normalize(pixels[None], how.mean, how.std)


def likeness(model: hvit_jax.ViT) -> np.ndarray:
    """Compare every patch with the one on the cup: cosines on the grid of patches."""
    # Compiled: run operation by operation, this would take seconds.
    features = hvit_jax.jit_model(model).dense_features(images)[0]
    features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
    return np.asarray(features @ features[CUP])


maps = [likeness(model) for model in (dense, reduced)]
tokens = reduced.reducer.schedule(reduced.config)[-1].tokens_out
print(f"tokens after the last block: {dense.config.num_tokens} dense, {tokens} tome")
print(f"correlation of the two maps: {np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1]:.2f}")
for row in maps[1][::2]:
    print("".join(" .:-=+*#%@"[int(np.clip(9 * value, 0, 9))] for value in row))
