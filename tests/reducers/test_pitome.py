"""PiToMe: energies, who merges, and how many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.ops.selection import behind_prefix
from hvit_jax.reducers import PiToMe, method_name
from hvit_jax.reducers.merging import MergeState
from hvit_jax.reducers.pitome import energies, match_by_energy
from tests.golden import Goldens
from tests.reducers.merges import holdings

# Eight blocks of 4 x 5 patches.
CONFIG = hvit_jax.ViTConfig((4, 5), 1, depth=8, width=4, heads=1, mlp_width=4)


@pytest.mark.parametrize("name", Goldens().cases("pitome_match"))
def test_parity_merging(name, goldens):
    case = goldens.case(name)
    margin, alpha, r = float(case["margin"]), float(case["alpha"]), int(case["r"])

    @jax.jit
    def merge(metric, x, sizes):
        energy = energies(metric, margin=margin, alpha=alpha)
        places = match_by_energy(metric, energy, r=r, protects=not case["bipartite"])
        places = behind_prefix(places, 1)
        state = MergeState(None, None, None, 1, sizes)
        return energy, places, *state.merged(x, places, tokens=x.shape[1] - r)

    arrays = case["metric"][:, 1:], case["x"], case["size"][..., 0]
    energy, places, merged, state = merge(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(energy, case["energy"], atol=1e-6)
    np.testing.assert_array_equal(np.argsort(-energy, axis=1, kind="stable"), case["order"])
    np.testing.assert_array_equal(holdings(places), case["source"])
    np.testing.assert_allclose(merged, case["merged"], atol=2e-6)
    np.testing.assert_array_equal(state.sizes, case["merged_size"][..., 0])


def test_energies_by_hand():
    """Unit vectors at 0, 60 and 90 degrees: cosines 1, 1/2, 0 and 1, sqrt(3)/2."""
    angles = np.radians([0, 60, 90])
    metric = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1)[None], jnp.float32)
    low = 2 * (np.exp([-0.1, -0.6]) - 1)
    expected = [(0.4 + low.sum()) / 3, (low[0] + 0.4 + 3**0.5 / 2 - 0.6) / 3]
    found = energies(3 * metric, margin=0.6, alpha=2.0)[0]
    np.testing.assert_allclose(found[:2], expected, atol=1e-6)


def test_margins_fall_and_blocks_protect():
    layers = PiToMe(r=1, margin=0.8).resolve(CONFIG).schedule(CONFIG)
    assert [layer.margin for layer in layers] == pytest.approx([0.1 * m for m in range(8, 0, -1)])
    assert [layer.protects for layer in layers] == [False] * 4 + [True] * 4
    last = PiToMe(r=1, bipartite_blocks="last_half").resolve(CONFIG).schedule(CONFIG)
    assert [layer.protects for layer in last] == [True] * 4 + [False] * 4


def test_at_most_half_of_the_patches_merge():
    """20 patches, of which 30% would remain: the floor of 14 leave, but 10 can."""
    layers = PiToMe(ratio=0.3).resolve(CONFIG).schedule(CONFIG)
    assert [layer.tokens_out for layer in layers] == [11, 6, 4, 3, 2, 2, 2, 2]


def test_default_ratio():
    config = hvit_jax.ViTConfig.vit_l16()
    resolved = PiToMe().resolve(config)
    assert resolved.ratio == pytest.approx(0.53 ** (1 / 24))
    assert resolved.schedule(config)[-1].tokens_out == pytest.approx(0.53 * 1024, abs=12)


def test_refuses_two_strengths():
    with pytest.raises(InputError, match="pitome: ratio=0.9: leave it out where r is given"):
        PiToMe(ratio=0.9, r=3).resolve(CONFIG)


def test_its_name_has_few_digits():
    assert method_name("pitome", {"ratio": 109 / 120}) == "pitome ratio=0.9083"
