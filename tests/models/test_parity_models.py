"""Every golden configuration, through the converter and the public API."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from tests.golden import Goldens, method_args

CONFIGS = [name for name, case in Goldens().configs.items() if case["method"] in hvit_jax.REDUCERS]


# These two sort hashes and projections. Some of the original's are one float32 rounding apart, and
# no two float32 programs need sort those alike: tokens are compared in float64.
UNDECIDED = ("act", "smyrf")


@pytest.mark.parametrize("name", CONFIGS)
def test_parity_float32(name, goldens, golden_checkpoint):
    model, images, draws = load(name, "float32", goldens, golden_checkpoint)
    method = model.reducer.name
    if method in UNDECIDED:
        logits = hvit_jax.jit_model(model)(images, draws)
    else:
        features = compute_features(model, images, draws)
        compare_tokens(features, name, goldens)
        if f"{name}/source" in goldens.models:
            compare_trace(features.states[-1], name, goldens)
        logits = features.output
    off = np.abs(logits - goldens.models[f"{name}/logits"]).max(1) > 1e-4
    assert off.sum() <= (method == "smyrf"), f"images {np.flatnonzero(off)} differ"


@pytest.mark.parametrize(
    "name", [name for name in CONFIGS if Goldens().configs[name]["method"] in UNDECIDED]
)
def test_parity_float64(name, goldens, golden_checkpoint):
    with jax.enable_x64(True):
        model, images, draws = load(name, "float64", goldens, golden_checkpoint)
        features = compute_features(model, images, draws)
    expected = goldens.models[f"{name}/logits"]
    np.testing.assert_allclose(features.output, expected, atol=1e-4, rtol=0)
    compare_tokens(features, name, goldens)


def compute_features(model, images, draws):
    """Compute logits, tokens and states with recorded draws, compiled."""
    graph, state = nnx.split(model)
    compiled = jax.jit(lambda state, x, draws: nnx.merge(graph, state).features(x, draws=draws))
    return compiled(state, images, draws)


def compare_tokens(features, name, goldens):
    """Compare how many tokens there are after each block, and those of the first image."""
    rows = [used_rows(*after) for after in zip(features.tokens, features.states, strict=True)]
    assert rows == goldens.configs[name]["tokens_after_block"]
    for block, tokens in enumerate(features.tokens):
        expected = goldens.models[f"{name}/block_{block}"]
        np.testing.assert_allclose(
            tokens[:1, : rows[block]], expected, atol=5e-4, rtol=0, err_msg=f"after block {block}"
        )


def compare_trace(state, name, goldens):
    """Compare which input tokens each token holds after the last block, CLS too, and how many."""
    source = goldens.models[f"{name}/source"]
    if goldens.configs[name]["method"] == "tofu":
        # The original counts what it drops to the tokens that it was most like.
        source = source * np.pad(state.source >= 0, ((0, 0), (1, 0)), constant_values=1)[:, None]
    held = np.asarray(state.source)[:, None] == np.arange(source.shape[1])[:, None]
    np.testing.assert_array_equal(held, source[..., 1:])
    assert (source[:, 0, 0] == 1).all() and (source[:, 1:, 0] == 0).all()
    if f"{name}/size" in goldens.models:
        # DiffRate's original has no other size than what attention weighs tokens by.
        sizes = getattr(state, "weights", state.sizes)
        expected = goldens.models[f"{name}/size"][..., 0]
        np.testing.assert_allclose(sizes, expected, rtol=1e-5 if "weights" in vars(state) else 1e-6)


def load(name, dtype, goldens, checkpoint):
    """Load a configuration's model, its images and the recorded draws."""
    entry = goldens.configs[name]
    model = hvit_jax.load(checkpoint, entry["method"], dtype=dtype, **method_args(entry["args"]))
    draws = goldens.draws(name, model.reducer.draws(model.config))
    return model, *jax.tree.map(jnp.asarray, (goldens.images(name), draws))


def used_rows(tokens, state):
    """Count the rows of a batch: all, or those of the longest image where rows are a budget."""
    if not hasattr(state, "rows"):
        return tokens.shape[1]
    assert int(state.rows.max()) <= tokens.shape[1]
    return int(state.rows.max())
