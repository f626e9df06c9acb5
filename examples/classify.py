"""Classify a picture with a reduced model, and see how often it agrees with the dense one."""

import jax.numpy as jnp
import numpy as np

import hvit_jax
from hvit_jax import demo
from hvit_jax.checkpoint import read_description
from hvit_jax.data.folder import read_folder
from hvit_jax.data.preprocess import normalize, resize_and_crop

checkpoint = demo.checkpoint_dir()  # or a folder written by `python -m convert`
dense = hvit_jax.load(checkpoint)
reduced = hvit_jax.load(checkpoint, "hourglass", num_clusters=36)

# Every tenth of the bundled pictures, prepared as the checkpoint says.
how = dense.preprocessing
folder = read_folder(demo.images_dir())
pixels = [
    resize_and_crop(folder.open(index), dense.config.image_shape, how)
    for index in range(0, len(folder), 10)
]
images = normalize(np.stack(pixels), how.mean, how.std)

# Compiled once for this batch shape; later calls are fast.
expected = hvit_jax.jit_model(dense)(images).argmax(-1)
found = hvit_jax.jit_model(reduced)(images).argmax(-1)

gflops = [hvit_jax.count_flops(dense.config, model.reducer) / 1e9 for model in (dense, reduced)]
print(f"GFLOPs: {gflops[0]:.3f} dense, {gflops[1]:.3f} hourglass")
print(f"agreement on {len(images)} pictures: {100 * jnp.mean(expected == found):.0f} %")
print("first picture:", read_description(checkpoint).classes[int(found[0])])
