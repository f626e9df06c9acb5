"""What a method must beat: chance, and averages of a coarser grid."""

import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.models.reducer import TokenState
from hvit_jax.ops.clustering import pool_tokens
from hvit_jax.reducers import EViT, Pool, Random, ToMe
from tests.golden import Goldens

# Four blocks of 20 patches.
CONFIG = hvit_jax.ViTConfig((4, 5), 1, depth=4, width=4, heads=1, mlp_width=4)


def tokens(method):
    return [layer.tokens_out for layer in method.resolve(CONFIG).schedule(CONFIG)]


def test_random_keeps_as_many_as_what_it_is_compared_with():
    assert tokens(Random()) == tokens(EViT())
    rates = {"keep_rate": 0.45, "drop_locations": (0, 3)}
    assert tokens(Random(**rates)) == tokens(EViT(**rates))
    assert tokens(Random(r=3)) == tokens(ToMe(r=3)) == [18, 15, 12, 9]
    assert tokens(Random(r=99)) == [2, 2, 2, 2]


def test_random_draws_are_the_seeds_and_all_images_share_them():
    draws = [Random(drop_seed=seed).resolve(CONFIG).draws(CONFIG) for seed in (0, 0, 1)]
    shapes = [None if each is None else each.shape for each in draws[0]]
    assert shapes == [None, (20,), (14,), (10,)]
    np.testing.assert_array_equal(draws[0][1], draws[1][1])
    assert (draws[0][1] != draws[2][1]).all() and (draws[0][1][:10] != draws[0][3]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rate": 0.5, "r": 3}, "random: keep_rate=0.5: leave it out where r is given"),
        ({"drop_locations": (1,), "r": 3}, "drop_locations=.*: leave it out where r is given"),
        ({"drop_locations": (4,)}, "the model's blocks are 0 to 3"),
    ],
)
def test_random_refuses(options, message):
    with pytest.raises(InputError, match=message):
        Random(**options).resolve(CONFIG)


@pytest.mark.parametrize("name", Goldens().cases("pool"))
def test_parity_pooling(name, goldens):
    case = goldens.case(name)
    grid, pooled = (tuple(map(int, case[key])) for key in ("grid", "pooled_grid"))
    found = pool_tokens(jnp.asarray(case["x"]), grid=grid, clusters=pooled)
    np.testing.assert_allclose(found, case["out"], atol=1e-6)


def test_pool_moves_patches_to_the_cells_that_hold_their_places():
    config = hvit_jax.ViTConfig((2, 3), 1, depth=1, width=1, heads=1, mlp_width=1)
    method = Pool(pool_location=0, grid=(1, 2)).resolve(config)
    (layer,) = method.schedule(config)
    x = jnp.arange(7.0).reshape(1, 7, 1)
    state = method.init(x, config, trace=True)
    pooled, state = method._pool(x, state, layer)
    # Both windows are two columns wide, and share the middle one, which the first cell holds.
    assert pooled[0, :, 0].tolist() == [0, 3, 4]
    assert state.source[0].tolist() == [1, 1, 2, 1, 1, 2] and state.sizes[0].tolist() == [1, 4, 2]
    assert isinstance(state, TokenState)


def test_pool_of_the_whole_grid_is_dense():
    assert tokens(Pool(grid=(4, 5))) == [21] * 4
    assert {layer.mode for layer in Pool(grid=(4, 5)).resolve(CONFIG).schedule(CONFIG)} == {"dense"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_location": 4}, "pool: pool_location=4: the model's blocks are 0 to 3"),
        ({"grid": (5, 5)}, r"pool: grid=\(5, 5\): it does not fit the 4 x 5 grid of patches"),
    ],
)
def test_pool_refuses(options, message):
    with pytest.raises(InputError, match=message):
        Pool(**options).resolve(CONFIG)
