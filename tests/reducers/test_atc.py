"""ATC: how many clusters each block leaves; see tests/ops/test_agglomeration.py for which."""

import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.reducers import ATC

# Four blocks of 20 patches.
CONFIG = hvit_jax.ViTConfig((4, 5), 1, depth=4, width=4, heads=1, mlp_width=4)


@pytest.mark.parametrize(
    ("options", "patches"),
    [
        ({"r": 4}, [17, 14, 11, 8]),
        ({"r": 4, "original_count": False}, [16, 12, 8, 4]),
        # One of them removes none; all of them leave one.
        ({"r": (1, 0, 99)}, [20, 20, 1, 1]),
        ({"r": (99,), "original_count": False}, [1, 1, 1, 1]),
        ({"keep_rate": 0.5, "locations": (1, 3)}, [20, 10, 10, 5]),
        ({"keep_rate": 0.7}, [20, 14, 9, 6]),
        ({"keep_rate": 0.01, "locations": (0,)}, [1, 1, 1, 1]),
    ],
)
def test_patches_after_every_block(options, patches):
    layers = ATC(**options).resolve(CONFIG).schedule(CONFIG)
    assert [layer.tokens_out - 1 for layer in layers] == patches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 3, "keep_rate": 0.5}, "atc: r=3: leave it out where keep_rate is given"),
        ({"locations": (1,)}, "locations=.*: they go with keep_rate"),
        ({"keep_rate": 0.5, "locations": (4,)}, "the model's blocks are 0 to 3"),
        ({"keep_rate": 0.5, "locations": (1, 1)}, "every block may appear only once"),
        ({"r": (1, 1, 1, 1, 1)}, "atc: r lists 5 numbers, the model has 4 blocks"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(InputError, match=message):
        ATC(**options).resolve(CONFIG)
