"""Logits of the full-size models for a picture of noise, from deterministic weights.

`python -m tests.full_size vit_l16` writes the logits of every method to tests/full_size.npz; the
slow tests compare with them. Of a photograph's patches many are so alike that rounding decides
which of them merge.
"""

import functools
import sys
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import hvit_jax
from hvit_jax.costs import at_cost
from hvit_jax.models.parameters import build_model, init_parameters
from tests.small_models import noise

FILE = Path(__file__).parent / "full_size.npz"
MODELS = ("vit_l16", "vit_h14")


@functools.lru_cache(1)
def parameters(model):
    return init_parameters(hvit_jax.MODELS[model], 0)


def forward(model, method):
    """Classify the picture.

    Returns:
        Logits (1000,), seconds of compilation, and the bytes of what lies between the blocks.
    """
    config = hvit_jax.MODELS[model]
    reducer = at_cost(method, config, 0.6)
    vit = build_model(config, reducer, parameters(model))
    graph, state = nnx.split(vit)
    images = noise(config)[:1]
    started = time.perf_counter()
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
        compiled = run.lower(state, images).compile()
    seconds = time.perf_counter() - started
    planned = compiled.memory_analysis().temp_size_in_bytes
    return np.asarray(compiled(state, images)[0]), seconds, planned


def main():
    found = dict(np.load(FILE)) if FILE.exists() else {}
    for model in sys.argv[1:] or MODELS:
        for method in sorted(hvit_jax.REDUCERS):
            logits, seconds, planned = forward(model, method)
            print(model, method, f"{seconds:.1f} s, {planned / 1e6:.0f} MB", logits[:3], flush=True)
            found[f"{model}/{method}"] = logits
        np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
