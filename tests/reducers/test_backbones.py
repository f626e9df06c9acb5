"""Every method on every kind of backbone; one compiled program a pair shows as much as it can.

The whole contract on all pairs is in test_contract.py, and slow.
"""

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hvit_jax.models.compiled import jit_model
from hvit_jax.reducers import ATS, REDUCERS
from hvit_jax.reducers.merging import PROPORTIONAL
from tests.ats_reference import sample
from tests.reducers.test_places import matched
from tests.small_models import KINDS, build, frozen, loud_parameters, noise
from tests.vit_reference import Reference, grid_places

# In the first of three blocks nothing is reduced yet, but by ToMe for dense prediction. A method
# that is not listed is tested with its defaults.
OPTIONS = {
    **{method: {} for method in REDUCERS},
    "hourglass": {"cluster_location": 1, "num_clusters": (3, 4)},
    "hourglass-reconstructed": {
        **{"cluster_location": 1, "num_clusters": (3, 4), "reconstruct_location": 2}
    },
    "evit": {"keep_rate": 0.6, "drop_locations": (1,)},
    "evit-fused": {"keep_rate": 0.6, "drop_locations": (1,), "fuse_token": True},
    "tome": {"r": (0, 6)},
    "tome_dense": {"r": 0.3},
    "act": {"first_block": 1, "q_hashes": 8},
    "ats": {"blocks": (1,), "residual": "input"},
    "pitome": {"r": (0, 6)},
    "tofu": {"r": (0, 6, 5), "prune_blocks": 2, "fuse": "mean"},
    "diffrate": {"prune_kept": (99, 60, 50), "merge_kept": (99, 50, 40)},
    "atc": {"r": (0, 7)},
    "mctf": {"r": 6, "blocks": (1, 2), "pooling": "size"},
    "random": {"r": (0, 6)},
    "pool": {"pool_location": 1, "grid": (3, 4)},
    "evo": {"prune_location": 1, "prune_ratio": 0.5},
    "smyrf": {"first_block": 1, "rounds": 2, "q_cluster_size": 10, "k_cluster_size": 10},
}
# Rotary positions, no CLS, registers alone: what methods treat differently. Of the other pairs
# blocks, embedding and pooling differ, which a dense model shows; as pairs they are slow tests.
TELLING = {
    "dinov3": tuple(set(OPTIONS) - {"atc", "random"}),
    "siglip": ("hourglass", "evit-fused", "tome", "ats", "evo"),
    "gap": ("hourglass", "evit", "tome", "ats", "evo"),
    "perception": ("hourglass", "tome", "ats"),
    "distilled": ("tome",),
    "dinov2": ("tome",),
}
PAIRS = [
    pytest.param(method, kind, marks=() if method in TELLING.get(kind, ()) else pytest.mark.slow)
    for kind in KINDS
    for method in OPTIONS
]
# Of these every token is computed, at its place.
PLAIN = ("dense", "padded", PROPORTIONAL)
CLASSIFYING = dataclasses.replace(
    KINDS["clip"], projection=0, num_classes=5, pool="avg", pool_before_norm=True
)


def test_ats_takes_the_original_residual_with_swags_positions_alone():
    found = {kind for kind in KINDS if ATS().resolve(KINDS[kind]).residual == "normalized"}
    assert found == {"swag", "distilled"}


def short(kind):
    return dataclasses.replace(KINDS[kind], depth=3)


def slack(expected, tolerance=1e-4):
    return {"atol": tolerance * max(1, np.abs(expected).max()), "rtol": 0}


class Seen(NamedTuple):
    """What a program makes of pictures: without and with a trace, after every block, restored."""

    output: np.ndarray
    traced: np.ndarray
    tokens: list[np.ndarray]
    states: list[SimpleNamespace]
    restored: np.ndarray


def _on_host(value):
    return np.asarray(value) if isinstance(value, jax.Array) else value


class Pair:
    """A method on a kind of backbone: what it makes of three pictures, and of silent blocks."""

    def __init__(self, method, kind):
        self.method, self.config = method, short(kind)
        self.prefix, rope = self.config.prefix_tokens, self.config.rope
        self.places = None if rope is None else grid_places(rope, self.config.grid)
        parameters, self.images = loud_parameters(self.config), noise(self.config)
        self.reference = Reference(self.config, parameters)
        model, silent = (
            build(self.config, parameters, method=method.split("-")[0], **OPTIONS[method])
            for _ in range(2)
        )
        self.layers = model.reducer.schedule(self.config)
        graph, self.weights = nnx.split(model)

        @jax.jit
        def run(weights, images):
            model = nnx.merge(graph, weights)
            features = model.features(images)
            restored = model.reducer.restore(features.tokens[-1], features.states[-1])
            return model(images), features, restored

        self._run = run
        self.seen = self.run(self.weights, self.images)
        self.silent = self.run(nnx.split(frozen(silent))[1], self.images)

    def run(self, weights, images):
        output, features, restored = self._run(weights, images)
        states = [
            SimpleNamespace(**{name: _on_host(value) for name, value in vars(state).items()})
            for state in features.states
        ]
        tokens = list(map(np.asarray, features.tokens))
        return Seen(
            np.asarray(output), np.asarray(features.output), tokens, states, np.asarray(restored)
        )

    def block(self, index, tokens, state, image):
        """Run one block of the reference on an image's tokens; `state` is None for block 0."""
        places, bias = self.places, 0
        if state is not None:
            tokens = tokens[: state.lengths[image]] if self.method == "ats" else tokens
            if places is not None:
                places = state.coordinates[image if len(state.coordinates) > 1 else 0]
                places = places[: len(tokens) - self.prefix]
            if self.layers[index].mode == PROPORTIONAL:
                bias = np.log(np.maximum(held(state, tokens[None])[image], 1))
        return self.reference.block(index, tokens, places, bias)


def _ranked(scores, count, first):
    """New places of patches, of which those of the highest scores stay, in falling order."""
    order = np.argsort(-scores, kind="stable")
    places = np.full(len(scores), -1)
    places[order[:count]] = first + np.arange(count)
    return places


def _scores(pair, index, x):
    """What CLS pays to the patches, or without it all patches on average: (heads, P)."""
    weights = pair.reference.attention(index, x, pair.places)
    rows = weights[:, :1] if pair.config.class_token else weights[:, pair.prefix :]
    return rows.mean(1)[:, pair.prefix :]


def _choose_by_evit(pair, image):
    weights = pair.reference.attention(1, pair.seen.tokens[0][image], pair.places)
    return _ranked(weights.mean((0, 1))[pair.prefix :], 29, pair.prefix)


def _choose_by_evo(pair, image):
    scores = _scores(pair, 0, pair.reference.embed(pair.images[image])).mean(0)
    return _ranked(scores, len(scores), pair.prefix)


def _choose_by_ats(pair, image):
    x = pair.seen.tokens[0][image]
    norms = np.linalg.norm(pair.reference.qkv(1, x, pair.places)[2], axis=1)
    scores = _scores(pair, 1, x).sum(0) * norms[pair.prefix :]
    chosen = sample(scores / scores.sum(), len(scores), len(scores) + 1)
    places = np.full(len(scores), -1)
    places[chosen] = pair.prefix + np.arange(len(chosen))
    return places


def _choose_by_tome(pair, image):
    """Pairs are found by keys that are not turned."""
    keys = pair.reference.qkv(1, pair.seen.tokens[0][image])[1]
    keys = keys.reshape(len(keys), pair.config.heads, -1).mean(1)
    pairs, stay, second = matched(keys, pair.prefix, 6)
    rows = [*range(pair.prefix), *(sorted(stay) if pair.prefix % 2 else stay), *second]
    return np.array([rows.index(pairs.get(i, i)) for i in range(pair.prefix, len(keys))])


CHOICES = {
    **{"evit": _choose_by_evit, "evo": _choose_by_evo},
    **{"ats": _choose_by_ats, "tome": _choose_by_tome},
}


def held(state, tokens):
    """How many patches each token holds: (B, N)."""
    return (state.source[..., None] == np.arange(tokens.shape[1])).sum(1)


@pytest.fixture(scope="class")
def pair(method, kind):
    return Pair(method, kind)


@pytest.mark.parametrize(("method", "kind"), PAIRS, scope="class")
class TestPairs:
    def test_shapes_are_those_of_the_schedule(self, pair):
        entering, (images, *_) = pair.config.num_tokens, pair.images.shape
        for layer, tokens, state in zip(
            pair.layers, pair.seen.tokens, pair.seen.states, strict=True
        ):
            assert layer.tokens_in == entering
            entering = layer.tokens_out
            assert tokens.shape == (images, entering, pair.config.width)
            assert np.isfinite(tokens).all()
            if pair.config.rope is not None:
                assert state.coordinates.shape[1:] == (entering - pair.prefix, 2)
        assert entering < pair.config.num_tokens or pair.method not in (
            "evit",
            "evit-fused",
            "tome",
        )
        assert pair.seen.restored.shape == (images, pair.config.num_patches, pair.config.width)
        assert np.isfinite(pair.seen.restored).all()

    def test_a_trace_changes_nothing(self, pair):
        np.testing.assert_allclose(pair.seen.output, pair.seen.traced, **slack(pair.seen.output))

    def test_an_image_does_not_see_its_batch(self, pair):
        """Its neighbours are others, in another order; the program is the same."""
        others = jnp.concatenate([pair.images[2:], 2 * pair.images[:1], pair.images[:1]])
        found, expected = pair.run(pair.weights, others).output, pair.seen.output
        np.testing.assert_allclose(found[[2, 0]], expected[[0, 2]], **slack(expected, 2e-5))

    def test_the_output_weighs_tokens_by_the_patches_that_they_hold(self, pair):
        tokens, state = pair.seen.tokens[-1], pair.seen.states[-1]
        sizes = held(state, tokens)[:, pair.prefix :]
        expected = [pair.reference.output(*each) for each in zip(tokens, sizes, strict=True)]
        np.testing.assert_allclose(pair.seen.output, expected, **slack(pair.seen.output))

    def test_blocks_behind_a_reduction_know_where_their_tokens_are(self, pair):
        """Those that reduce nothing are the reference's, at the places that the states tell."""
        before = np.stack([pair.reference.embed(image) for image in pair.images])
        state = None
        for index, layer in enumerate(pair.layers):
            tokens = pair.seen.tokens[index]
            if layer.mode in PLAIN and layer.tokens_in == layer.tokens_out:
                for image, got in enumerate(tokens):
                    expected = pair.block(index, before[image], state, image)
                    np.testing.assert_allclose(got[: len(expected)], expected, **slack(expected))
            before, state = tokens, pair.seen.states[index]

    def test_who_stays(self, pair):
        """Places after the second block, the first that reduces, from the tokens before it."""
        if pair.method not in CHOICES:
            pytest.skip("what it chooses is tested with its operations")
        for image, source in enumerate(pair.seen.states[1].source):
            expected = CHOICES[pair.method](pair, image)
            np.testing.assert_array_equal(source[expected >= 0], expected[expected >= 0])
            assert ((source < 0) == (expected < 0)).all()

    def test_prefix_tokens_stay_in_front(self, pair):
        first = pair.silent.tokens[0][:, : pair.prefix]
        for tokens, state in zip(pair.silent.tokens, pair.silent.states, strict=True):
            np.testing.assert_array_equal(tokens[:, : pair.prefix], first)
            assert ((state.source >= pair.prefix) | (state.source == -1)).all()

    def test_tokens_and_places_are_the_means_of_what_they_hold(self, pair):
        """Silent blocks show it: a patch that is alone in its token is the patch itself."""
        if pair.method.startswith("hourglass"):
            pytest.skip("its centroids are soft means; see test_hourglass.py")
        first = pair.silent.states[0].source
        patches = np.take_along_axis(pair.silent.tokens[0], first[..., None], axis=1)
        for tokens, state in zip(pair.silent.tokens, pair.silent.states, strict=True):
            counts = held(state, tokens)
            # What EViT fuses is a sum by score; DiffRate's are means of means.
            clear = counts == 1 if pair.method in ("evit-fused", "diffrate") else counts >= 1
            shares = (state.source[:, None] == np.arange(tokens.shape[1])[:, None]).astype(float)
            shares /= np.maximum(counts, 1)[..., None]
            np.testing.assert_allclose(tokens[clear], (shares @ patches)[clear], atol=1e-5)
            if pair.places is not None and len(state.coordinates) > 1:
                means = (shares @ pair.places)[:, pair.prefix :]
                clear = clear[:, pair.prefix :]
                np.testing.assert_allclose(state.coordinates[clear], means[clear], atol=1e-5)
        alone = np.take_along_axis(counts, np.maximum(state.source, 0), axis=1) == 1
        alone |= state.source < 0
        assert alone.any() or pair.method == "pool"
        np.testing.assert_array_equal(pair.silent.restored[alone], patches[alone])


@pytest.mark.parametrize("config", [*map(short, KINDS), CLASSIFYING], ids=[*KINDS, "classifying"])
def test_all_outputs_of_a_dense_model(config):
    """Final tokens by name, the pooled feature and the embedding, against the reference."""
    parameters, images = loud_parameters(config), noise(config)
    model, reference = build(config, parameters, method="dense"), Reference(config, parameters)
    graph, weights = nnx.split(model)

    @jax.jit
    def run(weights, images):
        model = nnx.merge(graph, weights)
        return model.tokens(images), model.pooled(images), model.image_embedding(images)

    tokens, pooled, embedding = run(weights, images)
    exists = {
        **{"cls": config.class_token, "distillation": config.distillation_token},
        **{"registers": config.registers > 0, "patches": True},
    }
    names = [name for name, there in exists.items() if there]
    assert tokens.keys() == set(names)
    for image, picture in enumerate(images):
        last = reference.run(picture)[-1]
        final, output = reference.final(last), reference.output(last)
        flat = [
            np.asarray(each[image]).reshape(-1, config.width) for each in map(tokens.get, names)
        ]
        np.testing.assert_allclose(np.concatenate(flat), final, **slack(final))
        np.testing.assert_allclose(pooled[image], reference.pooled(last), **slack(pooled))
        np.testing.assert_allclose(embedding[image], output / np.linalg.norm(output), atol=1e-4)


NEUTRAL = {
    "evit": {"keep_rate": 1.0, "fuse_token": True},
    "evo": {"prune_location": 1, "prune_ratio": 1.0},
    "hourglass": {"cluster_location": 1, "num_clusters": (6, 8), "cluster_window": 1},
    "tome": {"r": 0},
}


@pytest.mark.parametrize(
    ("kind", "methods"),
    [("dinov3", ["evit", "evo", "hourglass", "tome"]), ("siglip", ["evo", "tome"])],
)
def test_neutral_options_equal_dense(kind, methods):
    config, parameters = short(kind), loud_parameters(short(kind))
    dense = jit_model(build(config, parameters, method="dense"))(noise(config))
    for method in methods:
        model = build(config, parameters, method=method, **NEUTRAL[method])
        output = jit_model(model)(noise(config))
        np.testing.assert_allclose(output, dense, **slack(dense, 1e-5), err_msg=method)


# Those whose places and sizes follow from differentiable numbers, or from what may be 0.
@pytest.mark.parametrize("method", ["hourglass", "evit-fused", "tome"])
def test_gradients_are_finite(method):
    config = short("perception")
    model = build(config, loud_parameters(config), method=method.split("-")[0], **OPTIONS[method])
    graph, weights = nnx.split(model)

    def loss(weights, images):
        return jnp.square(nnx.merge(graph, weights)(images)).mean()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, noise(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


@pytest.mark.slow_for("pitome", "atc", "random", "pool")
@pytest.mark.parametrize(
    ("kind", "method"),
    [*(("perception", method) for method in OPTIONS), ("siglip", "ats"), ("siglip", "evo")],
)
def test_strict_modes_of_jax_in_bfloat16(kind, method):
    config = short(kind)
    model = build(
        **{"config": config, "parameters": loud_parameters(config), "dtype": "bfloat16"},
        **{"method": method.split("-")[0], **OPTIONS[method]},
    )
    graph, weights = nnx.split(model)

    def parts(weights, images):
        features = nnx.merge(graph, weights).features(images)
        return features.tokens, features.output, features.states[-1].coordinates

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        tokens, *others = jax.eval_shape(parts, weights, noise(config))
    assert {each.dtype.name for each in tokens} == {"bfloat16"}
    assert {each.dtype.name for each in jax.tree.leaves(others)} == {"float32"}


# Of the others roundings decide which tokens stay or attend.
@pytest.mark.parametrize("method", ["dense", "tome"])
def test_bfloat16_is_close_to_float32(method):
    config = short("dinov3")
    exact, rough = (
        np.asarray(
            jit_model(
                build(
                    **{"config": config, "parameters": loud_parameters(config), "dtype": dtype},
                    **{"method": method.split("-")[0], **OPTIONS[method]},
                )
            )(noise(config))
        )
        for dtype in ("float32", "bfloat16")
    )
    print(method, np.abs(exact - rough).mean() / exact.std())
    assert np.abs(exact - rough).mean() < 0.02 * exact.std()


def test_one_token_fused_in_one_block_after_the_other():
    """Then their number stays, but what they carry grows."""
    config = short("dinov3")
    options = {"keep_rate": 0.97, "drop_locations": (1, 2), "fuse_token": True}
    options["reconstruct_neighbors"] = 1
    model = build(config, loud_parameters(config), method="evit", **options)
    assert {layer.tokens_out for layer, _ in model.runs()} == {config.num_tokens}
    states = jit_model(model).features(noise(config)).states
    # The worst token is scaled by its score, and stays where it is.
    for before, after in zip(states, states[1:], strict=False):
        places = np.sort(np.asarray(before.coordinates) * np.ones((3, 1, 1)), axis=1)
        np.testing.assert_allclose(np.sort(after.coordinates, axis=1), places, atol=1e-5)
