"""EViT: which tokens stay, where the others went, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.models.reducer import Layer
from hvit_jax.reducers.evit import EViT, EViTState
from tests.published_rows import published, row_config, row_name, token_counts
from tests.small_models import block_of, compute_features, frozen

# Patch tokens after each drop, by model and keep rate.
KEPT = {
    ("vit_l16", 0.8): (820, 656, 525),
    ("vit_l16", 0.7): (717, 502, 352),
    ("vit_l16", 0.5): (512, 256, 128),
    ("vit_h14", 0.7): (959, 672, 471),
    ("vit_h14", 0.6): (822, 494, 297),
    ("vit_h14", 0.5): (685, 343, 172),
}


def make(config, **options):
    settings = {"keep_rate": 0.6, "drop_locations": (1, 2), **options}
    return hvit_jax.create(config, "evit", seed=1, **settings)


@pytest.mark.parametrize("row", published("evit"), ids=row_name)
class TestPublishedRows:
    def test_flops(self, row):
        counted = hvit_jax.count_flops(row_config(row), EViT(**row["args"])) / 1e9
        assert counted == pytest.approx(row["gflops"], abs=0.005)

    def test_tokens(self, row):
        config = row_config(row)
        counts = token_counts(config, EViT(**row["args"]))
        kept = (config.num_patches, *KEPT[row["model"], row["args"]["keep_rate"]])
        period = config.depth // 4
        assert counts == [1 + patches for patches in kept for _ in range(period)]


def test_fused_tokens_cost_their_sum_and_count_from_then_on():
    config = hvit_jax.ViTConfig.vit_b16()
    plain, fused = (EViT(keep_rate=0.5, fuse_token=fuse).resolve(config) for fuse in (False, True))
    sizes = [layer.tokens_out for layer in fused.schedule(config)]
    assert [sizes[block] for block in (2, 3, 6, 9)] == [577, 290, 147, 75]
    layer = Layer(577, 290, "drop")
    extra = fused.block_flops(config, layer) - plain.block_flops(config, layer)
    assert extra == 288 * 768


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("vit_b16", (3, 6, 9)), ("vit_l16", (6, 12, 18)), ("vit_h14", (8, 16, 24))],
)
def test_defaults_are_those_of_the_tables(name, blocks):
    resolved = EViT().resolve(hvit_jax.MODELS[name])
    assert resolved == EViT(0.7, blocks, fuse_token=False, score="mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_rate": 0.0}, "keep_rate=0.0: above 0 and at most 1"),
        ({"keep_rate": 1.2}, "keep_rate=1.2: above 0 and at most 1"),
        ({"keep_rate": -0.5}, "keep_rate=-0.5: above 0"),
        ({"keep_rate": "many"}, "keep_rate must be a number, got 'many'"),
        ({"keep_rate": float("nan")}, "keep_rate must be a number, got nan"),
        ({"drop_locations": (1, 4)}, r"drop_locations=\(1, 4\): the model's blocks are 0 to 3"),
        ({"drop_locations": (-1,)}, r"drop_locations=\(-1,\): the model's blocks are 0 to 3"),
        ({"drop_locations": (2, 1, 2)}, "every block may appear only once"),
        ({"drop_locations": 2}, "drop_locations must be a list of whole numbers"),
        ({"score": "max"}, "score must be one of mean, cls: 'max'"),
        ({"fuse_token": 1}, "fuse_token must be true or false, got 1"),
    ],
)
def test_wrong_options(small_config, options, message):
    with pytest.raises(InputError, match=message):
        make(small_config, **options)


@pytest.mark.parametrize("fuse", [False, True])
def test_keeping_all_is_dense(small_config, images, fuse):
    dense = hvit_jax.jit_model(hvit_jax.create(small_config, seed=1, unroll=True))(images)
    model = make(small_config, keep_rate=1, fuse_token=fuse, unroll=True)
    np.testing.assert_array_equal(hvit_jax.jit_model(model)(images), dense)


def test_a_rate_that_rounds_up_to_all_tokens_drops_nothing(small_config):
    layers = EViT(keep_rate=0.99, fuse_token=True).resolve(small_config).schedule(small_config)
    assert layers == (Layer(49, 49),) * 4


@pytest.mark.parametrize("score", ["mean", "cls"])
def test_drops_by_attention(small_config, images, score):
    model = make(small_config, score=score, drop_locations=(1,), unroll=True)
    features = compute_features(model, images)
    q, k, _ = (np.asarray(x.array) for x in block_of(model, 1).qkv(features.tokens[0]))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    rows = weights[:, :, :1] if score == "cls" else weights
    expected = np.argsort(-rows.mean((1, 2))[:, 1:], axis=1)[:, :29]
    for patches, source in zip(expected, np.asarray(features.states[1].source), strict=True):
        assert source[patches].tolist() == list(range(1, 30))
        assert (np.delete(source, patches) == -1).all()


@pytest.mark.parametrize(
    ("fuse", "sources", "lost"),
    [
        (False, ([[2, -1, 1, 3, -1]], [[-1, -1, 1, -1, -1]]), [20.0, 2.0, 0.0, 40.0, 5.0]),
        (True, ([[2, 4, 1, 3, 4]], [[2, 1, 2, 2, 1]]), [0.0] * 5),
    ],
)
def test_trace_by_hand(fuse, sources, lost):
    select = jax.jit(EViT(fuse_token=fuse)._select, static_argnums=3)
    x = jnp.array([[[9.0], [1.0], [2.0], [3.0], [4.0], [5.0]]])
    source = jnp.array([[1, 2, 3, 4, 5]], jnp.int32)
    state = EViTState(source, jnp.zeros((1, 5, 1)), None, 1, jnp.ones((1, 5)) if fuse else None)
    scores = jnp.array([[0.3, 0.1, 0.4, 0.3, 0.2]])
    x, state = select(x, scores, state, Layer(6, 4 + fuse, "drop"))
    assert x[0, :4, 0].tolist() == [9, 3, 1, 4]
    assert state.source.tolist() == sources[0]
    scores = jnp.array([[0.2, 0.1, 0.1, 0.9]])[:, : 3 + fuse]
    if fuse:
        np.testing.assert_allclose(x[0, 4], [0.1 * 2 + 0.2 * 5], rtol=1e-6)
    x, state = select(10 * x, scores, state, Layer(4 + fuse, 2 + fuse, "drop"))
    assert state.source.tolist() == sources[1]
    # The first patch of the second drop had grown tenfold before it was lost.
    lost = [10.0 if value == 20.0 else value for value in lost]
    np.testing.assert_allclose(state.dropped[0, :, 0], lost)


def test_restore_gives_dropped_patches_their_last_value(small_config, images):
    model = frozen(make(small_config, drop_locations=(1, 2)))
    features = compute_features(model, images)
    patches = features.tokens[0][:, 1:]
    for tokens, state in zip(features.tokens, features.states, strict=True):
        np.testing.assert_array_equal(model.reducer.restore(tokens, state), patches)
    assert (np.asarray(features.states[-1].source) < 0).sum(1).tolist() == [48 - 18] * 3


def test_fused_patches_are_restored_from_the_fused_token(small_config, images):
    model = frozen(make(small_config, drop_locations=(1,), fuse_token=True))
    features = compute_features(model, images)
    tokens, source = features.tokens[1], np.asarray(features.states[1].source)
    restored = np.asarray(model.reducer.restore(tokens, features.states[1]))
    assert tokens.shape[1] == 31
    for image in range(3):
        fused = source[image] == 30
        assert fused.sum() == 48 - 29
        np.testing.assert_array_equal(
            restored[image][fused], np.broadcast_to(tokens[image, -1], (19, 32))
        )
        np.testing.assert_array_equal(
            restored[image][~fused], features.tokens[0][image, 1:][~fused]
        )
