"""Chains of two methods: what they hand over, and what one method does alone in its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.commands.flags import parse
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.reducers import make_reducer, method_name
from tests.small_models import KINDS, SMALL, build, compute_features, loud_parameters, noise

# Registers, rotary positions, and the mean of the patches.
CONFIG = KINDS["dinov3"]
IMAGES = noise(CONFIG)


def model_of(method, **options):
    return build(CONFIG, loud_parameters(CONFIG), method=method, **options)


@pytest.mark.parametrize(
    ("method", "options", "alone", "same"),
    [
        (
            "evit+evit",
            {"first_keep_rate": 0.6, "first_drop_locations": (1,), "second_drop_locations": (0,)},
            "evit",
            {"keep_rate": 0.6, "drop_locations": (1, 2)},
        ),
        ("dense+tome", {"r": (6, 4)}, "tome", {"r": (0, 0, 6, 4)}),
    ],
)
def test_two_methods_in_a_row_do_what_one_does_in_all_blocks(method, options, alone, same):
    options |= {"second_keep_rate": 0.6} if method == "evit+evit" else {}
    both, one = model_of(method, chain_at=2, **options), model_of(alone, **same)
    found, expected = compute_features(both, IMAGES), compute_features(one, IMAGES)
    np.testing.assert_allclose(found.output, expected.output, atol=1e-6)
    steps = zip(found.tokens, found.states, expected.tokens, expected.states, strict=True)
    for tokens, state, others, other in steps:
        np.testing.assert_allclose(tokens, others, atol=1e-5)
        np.testing.assert_array_equal(state.source, other.source)
        np.testing.assert_allclose(state.dropped, other.dropped, atol=1e-5)
        np.testing.assert_allclose(state.coordinates, other.coordinates, atol=1e-6)
        restored = both.reducer.restore(tokens, state)
        np.testing.assert_allclose(restored, one.reducer.restore(others, other), atol=1e-5)
    counted = [hvit_jax.count_flops(CONFIG, each.reducer) for each in (both, one)]
    assert counted[0] == counted[1]


def test_random_numbers_are_those_of_each_method():
    options = {"rounds": 2, "q_cluster_size": 13, "k_cluster_size": 13, "first_block": 0}
    both = make_reducer("smyrf+evit", chain_at=2, **options).resolve(CONFIG).draws(CONFIG)
    one = make_reducer("smyrf", last_block=1, **options).resolve(CONFIG).draws(CONFIG)
    assert len(both) == 4 and both[2:] == one[2:] == (None, None)
    jax.tree.map(np.testing.assert_array_equal, both[:2], one[:2])


@pytest.fixture(scope="module")
def merged():
    """Tokens merged, some of which were then dropped by a method that counts none itself."""
    model = model_of("tome+evit", r=8, keep_rate=0.5, drop_locations=(1,), chain_at=2)
    return model, compute_features(model, IMAGES)


def test_what_was_handed_over_counts_where_patches_are_pooled(merged):
    model, features = merged
    x, state = features.tokens[-1], features.states[-1]
    sizes = model.reducer.patch_sizes(x, state)
    places = jnp.arange(CONFIG.prefix_tokens, x.shape[1])
    np.testing.assert_array_equal(sizes, (state.source[..., None] == places).sum(1))
    assert sizes.max() > 1 and (state.source < 0).any()
    # So does a pass that traces nothing else.
    np.testing.assert_allclose(hvit_jax.jit_model(model)(IMAGES), features.output, atol=1e-5)


def test_what_decoders_read_of_dropped_patches_can_be_changed(merged):
    """They normalise it, as they do the tokens."""
    model, features = merged
    x, state = features.tokens[-1], features.states[-1]
    twice = model.reducer.restore(2 * x, state.with_dropped(lambda values: 2 * values))
    np.testing.assert_array_equal(twice, 2 * model.reducer.restore(x, state))


def test_names_options_and_commands():
    first, second = make_reducer("hourglass", num_clusters=9), make_reducer("evit", keep_rate=0.5)
    chain = hvit_jax.chain(first, second, 3)
    words = "--chain-at 3 --num-clusters 9 --keep-rate 0.5 --no-second-pool-by-size".split()
    parsed = parse(EvalConfig, ["--method", "hourglass+evit", *words], "x").reducer
    assert parsed is not None and parsed.parts[0] == first
    assert parsed.parts[1] == make_reducer("evit", keep_rate=0.5, pool_by_size=False)
    assert parsed.words() == ["--method", "hourglass+evit", *words]
    assert make_reducer(chain.name, **chain.options()) == chain
    assert method_name(chain.name, chain.options()) == (
        "hourglass+evit chain_at=3 num_clusters=9 keep_rate=0.5"
    )
    resolved = chain.resolve(SMALL)
    # Each fills in what depends on its own blocks: three of them, and one.
    assert (resolved.cluster_location, resolved.drop_locations) == (1, (0,))
    assert resolved.resolve(SMALL) == resolved


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("evit+hourglass", {}, "hourglass cannot be the second method of a chain: it needs the"),
        ("ats+evit", {}, "ats cannot be chained: its budgets are measured on whole models"),
        ("evit+evo", {}, "evo cannot be chained: the tokens that it leaves out wait for the last"),
        ("evit+evti", {}, "unknown method 'evti', did you mean 'evit'"),
        ("evit+evit+evit", {}, "a chain has two methods, not 3: evit\\+evit\\+evit"),
        ("tome+evit", {"chain_at": 4}, "tome\\+evit: chain_at=4: from 1 to 3, the model's last"),
        (
            "tome+evit",
            {"drop_locations": (2,)},
            "tome\\+evit, from block 2 on, counted as 0: evit: drop_locations=\\(2,\\): "
            "the model's blocks are 0 to 1",
        ),
    ],
)
def test_what_cannot_be_is_said(method, options, message):
    with pytest.raises(InputError, match=message):
        make_reducer(method, **options).resolve(SMALL)
