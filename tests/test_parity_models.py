"""Every golden configuration, through the converter and the public API."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from tests.golden import Goldens, method_args

CONFIGS = [name for name, case in Goldens().configs.items() if case["method"] in hvit_jax.REDUCERS]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, goldens, golden_checkpoint):
    name = request.param
    entry = goldens.configs[name]
    model = hvit_jax.load(golden_checkpoint, entry["method"], **method_args(entry["args"]))
    draws = goldens.draws(name, model.reducer.draws(model.config))
    return name, model, *jax.tree.map(jnp.asarray, (goldens.images(name), draws))


def test_parity_logits(case, goldens):
    name, model, images, draws = case
    logits = model(images, draws=draws)
    np.testing.assert_allclose(logits, goldens.models[f"{name}/logits"], atol=1e-4, rtol=0)


def test_parity_tokens(case, goldens):
    name, model, images, draws = case
    features = model.features(images, draws=draws)
    rows = [used_rows(*after) for after in zip(features.tokens, features.states, strict=True)]
    assert rows == goldens.configs[name]["tokens_after_block"]
    for block, tokens in enumerate(features.tokens):
        expected = goldens.models[f"{name}/block_{block}"]
        np.testing.assert_allclose(
            tokens[:1, : rows[block]], expected, atol=5e-4, rtol=0, err_msg=f"after block {block}"
        )


def used_rows(tokens, state):
    """Count the rows of a batch: all, or those of the longest image where rows are a budget."""
    if not hasattr(state, "rows"):
        return tokens.shape[1]
    assert int(state.rows.max()) <= tokens.shape[1]
    return int(state.rows.max())
