"""Fine-tune under a method in a training loop of your own.

`hvit train` does this properly; here are the few lines that it comes down to.
"""

import jax
import numpy as np
import optax
from flax import nnx

import hvit_jax
from hvit_jax import demo
from hvit_jax.data.folder import read_folder
from hvit_jax.data.preprocess import normalize, resize_and_crop

# So few tokens that the model has to get used to it.
model = hvit_jax.load(demo.checkpoint_dir(), "evit", keep_rate=0.3)
optimizer = nnx.Optimizer(model, optax.adamw(2e-4), wrt=nnx.Param)

folder = read_folder(demo.images_dir())
chosen = np.random.default_rng(0).permutation(len(folder))[:256]
how = model.preprocessing  # as the checkpoint says
pixels = [resize_and_crop(folder.open(index), model.config.image_shape, how) for index in chosen]
images = normalize(np.stack(pixels), how.mean, how.std)
labels = np.array(folder.labels)[chosen]


@nnx.jit
def step(model, optimizer, images, labels):
    """Take one step and return the loss before it."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


for epoch in range(4):
    batches = np.random.default_rng(epoch).permutation(len(images)).reshape(-1, 32)
    losses = [step(model, optimizer, images[batch], labels[batch]) for batch in batches]
    print(f"epoch {epoch}: loss {np.mean(jax.device_get(losses)):.3f}")
