"""MCTF: scores, matching, weights, and attention one step ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.ops.merging import merge_groups
from hvit_jax.reducers import MCTF
from hvit_jax.reducers.merging import MergeState
from tests.golden import Goldens
from tests.reducers.merges import holdings
from tests.small_models import SMALL, build, classify, noise, sharp_parameters

# Four blocks of 20 patches.
CONFIG = hvit_jax.ViTConfig((4, 5), 1, depth=4, width=4, heads=1, mlp_width=4)


@pytest.mark.parametrize("name", Goldens().cases("mctf"))
def test_parity_fusing(name, goldens):
    case = goldens.case(name)
    r, left = int(case["r"]), case["x"].shape[1] - int(case["r"])
    taus = {f"tau_{each}": float(case[f"tau_{each}"]) for each in ("similarity", "information")}
    method = MCTF(
        **{**taus, "tau_size": float(case["tau_size"]), "pooling": str(case["pooling"])},
        bidirectional=bool(case["bidirectional"]),
    )

    @jax.jit
    def fuse(attention, x, sizes):
        received, state = attention.mean((1, 2)), MergeState(None, None, None, 1, sizes)
        places, weights = method._match(x, received, state, r=r), method._weights(received, state)
        fused, state = state.merged(x, places, tokens=left, means_by=weights)
        # Values that tell which fused token they are make of attention's rows those of the map.
        rows = (attention @ jnp.eye(left)[places][:, None]).swapaxes(1, 2)
        means = merge_groups(rows.reshape(*x.shape[:2], -1), weights, places, tokens=left)
        return places, fused, state.sizes, means.reshape(len(x), left, -1, left)

    sizes = case["size"][..., 0] if "size" in case else np.ones(case["x"].shape[:2], np.float32)
    places, fused, sizes, rows = fuse(*map(jnp.asarray, (case["attention"], case["x"], sizes)))
    np.testing.assert_array_equal(holdings(places), case["source"])
    np.testing.assert_allclose(fused, case["merged"], atol=2e-6)
    np.testing.assert_array_equal(sizes, case["merged_size"][..., 0])
    np.testing.assert_allclose(rows, case["merged_attention"].swapaxes(1, 2), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"r": 4}, [21, 17, 13, 10]),
        ({"r": 0.25}, [21, 16, 13, 10]),
        ({"r": 99, "blocks": (0, 2)}, [11, 11, 10, 10]),
        ({"r": 0.9}, [21, 11, 6, 4]),
        ({"r": 0}, [21, 21, 21, 21]),
    ],
)
def test_tokens_after_every_block(options, tokens):
    """A number leaves 10 tokens at least, and either one half of the patches."""
    layers = MCTF(**options).resolve(CONFIG).schedule(CONFIG)
    assert [layer.tokens_out for layer in layers] == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 4)}, "mctf: blocks=.*: the model's blocks are 0 to 3"),
        ({"r": 4.5}, "mctf: r=4.5: a whole number, or a part below 1"),
        ({"one_step_ahead": 0}, "mctf: one_step_ahead must be at least 1 and at most 2, got 0"),
    ],
)
def test_refuses_what_is_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        MCTF(**options).resolve(CONFIG)


def test_tokens_that_nothing_attends_to_have_a_mean():
    """Attention so sharp that it is 0 for most keys; the dense model is finite too."""
    model = build(SMALL, sharp_parameters(SMALL, 1000), method="mctf", r=2, blocks=(1,))
    assert np.isfinite(classify(model, noise(SMALL))[0]).all()
