"""ToFu: dropping, merging by MLERP, and where each happens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.ops.matching import match_tokens
from hvit_jax.ops.merging import drop_places, drop_tokens, merge_tokens
from hvit_jax.reducers import ToFu
from hvit_jax.reducers.tofu import mlerp
from tests.golden import Goldens
from tests.reducers.merges import holdings

CONFIG = hvit_jax.ViTConfig((4, 5), 1, depth=8, width=4, heads=1, mlp_width=4)


@pytest.mark.parametrize("name", Goldens().cases("tofu"))
def test_parity_merging(name, goldens):
    case = goldens.case(name)

    @jax.jit
    def reduce(metric, x):
        matching = match_tokens(metric, r=int(case["r"]))
        mean, _ = merge_tokens(x, jnp.ones(x.shape[:2]), matching)
        return matching.places, drop_tokens(x, matching), mean, mlerp(x, matching)

    places, dropped, mean, scaled = reduce(*map(jnp.asarray, (case["metric"], case["x"])))
    np.testing.assert_array_equal(holdings(places), case["source"])
    np.testing.assert_array_equal(dropped, case["pruned"])
    np.testing.assert_allclose(mean, case["mean"], atol=2e-6)
    np.testing.assert_allclose(scaled, case["mlerp"], atol=2e-6)


@pytest.mark.parametrize("norm", ["receiver", "mean"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_mlerp_against_loops(prefix, norm):
    """Tokens that nothing joined stay bit for bit; the others take the largest norm."""
    rng = np.random.default_rng(prefix)
    metric, x = rng.normal(size=(2, 1, 13, 4)).astype(np.float32)

    @jax.jit
    def merge(metric, x):
        matching = match_tokens(metric, r=4, prefix=prefix)
        return matching.places[0], drop_places(matching)[0], mlerp(x, matching, norm=norm)[0]

    places, dropped, merged = map(np.asarray, merge(jnp.asarray(metric), jnp.asarray(x)))
    assert (dropped < 0).sum() == 4 and (dropped[:prefix] == np.arange(prefix)).all()
    for place in range(9):
        (receiver,) = np.flatnonzero(dropped == place)
        parts = x[0][places == place]
        mean = parts.mean(0)
        own = np.linalg.norm(x[0, receiver] if norm == "receiver" else mean)
        largest = np.linalg.norm(parts, axis=1).max()
        expected = mean * largest / own if len(parts) > 1 else parts[0]
        np.testing.assert_allclose(merged[place], expected, rtol=1e-5)


def test_first_blocks_drop_and_later_ones_merge():
    """CLS counts in what the ratio is of: the floor of 2.1 of 21 leave, then of 1.9."""
    resolved = ToFu(ratio=0.9).resolve(CONFIG)
    layers = resolved.schedule(CONFIG)
    assert [layer.tokens_out for layer in layers] == [19, 18, 17, 16, 15, 14, 13, 12]
    assert [layer.mode for layer in layers] == ["prune"] * 5 + ["fuse"] * 3
    assert resolved.prune_blocks == 5


def test_at_most_half_of_the_patches_leave():
    layers = ToFu(r=99).resolve(CONFIG).schedule(CONFIG)
    assert [layer.tokens_out for layer in layers] == [11, 6, 4, 3, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.9, "r": 3}, "tofu: ratio=0.9: leave it out where r is given"),
        ({"prune_blocks": 9}, "tofu: prune_blocks=9: the model has 8 blocks"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(InputError, match=message):
        ToFu(**options).resolve(CONFIG)
