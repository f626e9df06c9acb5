"""What every method promises, checked on all of them; a new method adds one entry to CASES.

SWAG's backbone is checked here in every run, the other kinds in the slow one; what is left of them
for every run is in test_backbones.py.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from hvit_jax.models.reducer import TokenState
from hvit_jax.reducers import Budgeted, method_class, warn_without_budgets
from tests.small_models import KINDS, classify, compute_dense_features, compute_features


@dataclass(frozen=True)
class Case:
    """Options on a 6 x 8 grid and four blocks, and those under which nothing is reduced.

    A case's name is its method's, and more behind a hyphen where a method has several. `holds` says
    how many patches a token stands for: "one", "some", or "any" number, even none.
    """

    options: dict[str, Any] = field(default_factory=dict)
    neutral: dict[str, Any] | None = None
    holds: str = "one"


CASES = {
    "dense": Case(neutral={}),
    "hourglass": Case(
        {"cluster_location": 1, "num_clusters": (3, 4)},
        # In a window of one, every patch is its own centroid.
        neutral={"cluster_location": 1, "num_clusters": (6, 8), "cluster_window": 1},
        holds="any",
    ),
    "hourglass-reconstructed": Case(
        {"cluster_location": 1, "num_clusters": (3, 4), "reconstruct_location": 2},
        # A tight softmax leaves every patch its own centroid.
        neutral={
            "cluster_location": 1,
            "num_clusters": (6, 8),
            "cluster_window": 1,
            "reconstruct_location": 2,
            "reconstruct_neighbors": 1,
        },
        holds="any",
    ),
    "hourglass-auto": Case(
        {
            "cluster_location": 1,
            "num_clusters": (3, 4),
            "cluster_temperature": "auto",
            "reconstruct_temperature": "auto",
        },
        neutral={
            "cluster_location": 1,
            "num_clusters": (6, 8),
            "cluster_window": 1,
            "cluster_temperature": "auto",
        },
        holds="any",
    ),
    "evit": Case({"keep_rate": 0.6, "drop_locations": (1, 2)}, neutral={"keep_rate": 1.0}),
    "tome": Case({"r": 6}, neutral={"r": 0}, holds="some"),
    "tome_dense": Case({"r": 0.3}, neutral={"r": 0.0}),
    "act": Case({"q_hashes": 8}, neutral={"group_queries": False}),
    # ATS has no neutral setting: an image never keeps the patch that scores lowest.
    "ats": Case({"blocks": (1, 3)}),
    "evo": Case(
        {"prune_location": 1, "prune_ratio": 0.5}, neutral={"prune_location": 1, "prune_ratio": 1.0}
    ),
    # These reduce in block 1 alone, so that less is compiled, and two blocks are scanned.
    "pitome": Case(
        {"r": (0, 12), "bipartite_blocks": "none", "proportional_attention": True},
        neutral={"ratio": 1.0},
        holds="some",
    ),
    "tofu": Case({"r": (0, 12), "prune_blocks": 0}, neutral={"ratio": 1.0}, holds="some"),
    "diffrate": Case(
        {"prune_kept": (49, 40, 40, 40), "merge_kept": (49, 30, 30, 30)},
        neutral={"r": 0},
        holds="some",
    ),
    "atc": Case({"r": (0, 12)}, neutral={"r": 0}, holds="some"),
    "mctf": Case({"r": 12, "blocks": (1,)}, neutral={"r": 0}, holds="some"),
    "random": Case({"keep_rate": 0.6, "drop_locations": (1,)}, neutral={"keep_rate": 1.0}),
    "pool": Case({"pool_location": 1, "grid": (3, 4)}, neutral={"grid": (6, 8)}, holds="any"),
    "smyrf": Case(
        {"first_block": 1, "rounds": 4, "q_cluster_size": 10, "k_cluster_size": 10},
        neutral={"rounds": 2, "q_cluster_size": 49, "k_cluster_size": 49},
    ),
    # The grid becomes centroids, some of which are dropped.
    "hourglass+evit": Case(
        {"cluster_location": 1, "num_clusters": (3, 4), "keep_rate": 0.6, "drop_locations": (0,)},
        neutral={"num_clusters": (6, 8), "cluster_window": 1, "keep_rate": 1.0},
        holds="any",
    ),
}
METHODS = sorted(CASES)
# What these do has a like among the others.
ALIKE = ("pitome", "diffrate", "atc", "random", "pool")


def on_every_kind(methods):
    """Pairs of a method and a kind of backbone."""
    return [
        pytest.param(method, kind, marks=() if kind == "swag" else pytest.mark.slow)
        for kind in KINDS
        for method in methods
    ]


def make(config, method, **options):
    options = {**CASES[method].options, **options}
    return hvit_jax.create(config, name(method), seed=1, **options)


def name(case):
    return case.split("-")[0]


def outputs(config):
    return config.num_classes or config.projection or config.feature_width


BUDGETED = [case for case in METHODS if issubclass(method_class(name(case)), Budgeted)]


def test_every_method_has_a_case():
    assert {name(case) for case in CASES if "+" not in case} == set(hvit_jax.REDUCERS)


@pytest.fixture(scope="class")
def config(kind):
    return KINDS[kind]


@pytest.fixture(scope="class")
def model(method, config):
    return make(config, method)


@pytest.fixture(scope="class")
def forward(model):
    return hvit_jax.jit_model(model)


@pytest.fixture(scope="class")
def logits(forward, images):
    return np.asarray(forward(images))


@pytest.fixture(scope="class")
def features(model, images):
    return compute_features(model, images)


# By class: a method's tests share its model, and what it makes of the images.
@pytest.mark.parametrize(("method", "kind"), on_every_kind(METHODS), scope="class")
class TestContract:
    def test_shapes_are_those_of_the_schedule(self, model, features, config, images):
        layers = model.reducer.schedule(config)
        assert len(layers) == len(features.tokens) == len(features.states) == config.depth
        entering = config.num_tokens
        for layer, tokens in zip(layers, features.tokens, strict=True):
            assert layer.tokens_in == entering
            assert tokens.shape == (len(images), layer.tokens_out, config.width)
            entering = layer.tokens_out
        assert features.output.shape == (len(images), outputs(config))

    def test_second_batch_does_not_recompile(self, forward, logits, images):
        compiled = forward.run._cache_size()
        second = forward(images[::-1])
        assert forward.run._cache_size() == compiled
        assert not np.array_equal(logits, second)
        np.testing.assert_array_equal(logits, forward(images))

    def test_no_images_give_no_results(self, method, model, forward, config):
        """The dense model shows that such programs run; tracing shows what they are made of."""
        none = jnp.zeros((0, *config.image_shape, 3))

        def parts(images):
            features = model.features(images)
            # A state's declared types are those of arrays, not of their shapes.
            states = jax.tree.leaves(features.states)
            return model(images), model.dense_features(images), features.tokens, states

        logits, grid, tokens, states = jax.eval_shape(parts, none)
        assert logits.shape == (0, outputs(config))
        assert grid.shape == (0, *config.grid, config.width)
        if method == "dense":
            assert forward(none).shape == logits.shape
            assert forward.dense_features(none).shape == grid.shape
        assert {leaf.shape[0] for leaf in (*tokens, *states)} == {0}
        counts = [layer.tokens_out for layer in model.reducer.schedule(config)]
        assert [x.shape[1] for x in tokens] == counts

    def test_strict_modes_of_jax(self, method, config, images):
        """Nothing relies on implicit promotion of ranks or types; shapes are enough to see it."""
        graph, state = nnx.split(make(config, method, dtype="bfloat16"))

        def loss(state, images):
            model = nnx.merge(graph, state)
            return jnp.square(model(images)).mean(), model.dense_features(images)

        with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
            jax.eval_shape(jax.grad(loss, argnums=(0, 1), has_aux=True), state, images)
            jax.eval_shape(make(config, method, dtype="float8").dense_features, images)

    def test_numbers_do_not_depend_on_whether_jax_has_64_bits(self, method, config, model):
        """Weights are drawn alike whatever the method."""
        with jax.enable_x64(True):
            wide = nnx.state(make(config, method)) if method == "dense" else None
            drawn = model.reducer.draws(config)
        expected = nnx.state(model) if method == "dense" else None, model.reducer.draws(config)
        jax.tree.map(np.testing.assert_array_equal, (wide, drawn), expected)
        types = {leaf.dtype for leaf in jax.tree.leaves((wide, drawn))}
        assert types <= {np.dtype("float32")}

    def test_an_image_does_not_see_its_batch(self, forward, logits, images):
        """Among copies of itself it is what it is among others, in the same program."""
        alone = [forward(jnp.stack([image] * len(images)))[0] for image in images]
        np.testing.assert_allclose(logits, alone, atol=2e-5)

    def test_the_forward_pass_scatters_nothing_but_permutations(self, model, images):
        program = str(jax.make_jaxpr(hvit_jax.jit_model(model))(images))
        assert "scatter-" not in program
        once = re.findall(r"scatter\[[^]]*?unique_indices=(\w+)", program)
        assert len(once) == program.count("scatter[") and set(once) <= {"True"}

    @pytest.mark.slow_for(*ALIKE, "tofu")
    def test_scan_equals_unrolled(self, method, config, logits, images):
        unrolled = hvit_jax.jit_model(make(config, method, unroll=True))(images)
        np.testing.assert_allclose(logits, unrolled, atol=2e-5)

    def test_features_end_in_the_logits(self, features, logits):
        np.testing.assert_allclose(features.output, logits, atol=2e-5)

    @pytest.mark.slow_for(*ALIKE)
    def test_bfloat16_is_close_to_float32(self, method, config, forward, logits, images):
        """It moves the logits by 2%, or as float32 does for pictures that move by 2^-7 of them.

        Such pictures, too, tip what is nearly a tie: attention of random weights is nearly uniform,
        and some of PiToMe's energies are 1e-6 apart.
        """
        model = make(config, method, dtype="bfloat16")
        graph, state = nnx.split(model)
        tokens = jax.eval_shape(lambda s, x: nnx.merge(graph, s).features(x).tokens, state, images)
        assert tokens[-1].dtype == jnp.bfloat16
        rough = np.asarray(hvit_jax.jit_model(model)(images))
        assert rough.dtype == np.float32
        noise = 2**-7 * np.random.default_rng(1).normal(size=(8, *images.shape))
        moved = [forward(images * (1 + jnp.float32(each))) for each in noise]
        most = max(np.abs(each - logits).mean() for each in moved)
        assert np.abs(rough - logits).mean() < max(0.02 * logits.std(), 1.5 * most)

    @pytest.mark.slow_for("atc", "random", "pool")
    def test_gradients_are_finite(self, model, images):
        graph, state = nnx.split(model)

        def loss(state, images):
            return jnp.square(nnx.merge(graph, state)(images)).mean()

        by_weights, by_images = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, images)
        leaves = jax.tree.leaves((by_weights, by_images))
        assert all(np.isfinite(leaf).all() for leaf in leaves)
        last = [by_weights[name] for name in ("head", "projection", "ln") if name in by_weights]
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(last[0]))
        assert np.abs(by_images).max() > 0

    def test_trace_accounts_for_every_patch(self, features, config, images):
        for tokens, state in zip(features.tokens, features.states, strict=True):
            assert isinstance(state, TokenState)
            source = np.asarray(state.source)
            assert source.shape == (len(images), config.num_patches)
            assert source.min() >= -1 and source.max() < tokens.shape[1]
            held_before = (source >= 0) & (source < config.prefix_tokens)
            assert not held_before.any(), "a patch is held by a token before the patches"

    def test_tokens_hold_the_patches_that_are_left(self, method, features, config, images):
        """Prefix tokens hold none; no patch is lost but those that were dropped for good."""
        prefix = config.prefix_tokens
        gone = np.zeros((len(images), config.num_patches), bool)
        for tokens, state in zip(features.tokens, features.states, strict=True):
            rows = np.arange(tokens.shape[1])
            held = (np.asarray(state.source)[..., None] == rows).sum(1)
            lengths = getattr(state, "lengths", np.full(len(images), len(rows)))
            exists = rows[prefix:] < lengths[:, None]
            assert (held[:, prefix:][~exists] == 0).all()
            if CASES[method].holds != "any":
                assert (held[:, prefix:][exists] >= 1).all(), "a token holds no patch"
            if CASES[method].holds == "one":
                assert held.max() == 1, "a patch was kept twice, or two tokens merged"
            if getattr(state, "sizes", None) is not None:
                sizes = np.asarray(state.sizes)[:, -exists.shape[1] :]
                np.testing.assert_array_equal(sizes, held[:, prefix:])
            assert (held.sum(1) + (state.source < 0).sum(1) == config.num_patches).all()
            assert not (gone & np.asarray(state.source >= 0)).any(), "a dropped patch came back"
            gone = np.asarray(state.source < 0)
            assert (np.abs(state.dropped).max(-1) > 0).tolist() == gone.tolist()

    def test_restore_fills_the_grid(self, model, features, config, images):
        for tokens, state in zip(features.tokens, features.states, strict=True):
            restored = np.asarray(model.reducer.restore(tokens, state))
            assert restored.shape == (len(images), config.num_patches, config.width)
            assert np.isfinite(restored).all()
            assert (np.abs(restored).max(-1) > 0).all(), "a patch was left empty"

    @pytest.mark.slow_for(*ALIKE, "tofu", "mctf")
    def test_dense_features_are_the_restored_tokens(self, model, features, config, images):
        grid = compute_dense_features(model, images)
        assert grid.shape == (len(images), *config.grid, config.width)
        restored = model.reducer.restore(features.tokens[-1], features.states[-1])
        restored = restored if model.ln is None else model.ln(restored)
        np.testing.assert_allclose(grid, restored.reshape(grid.shape), atol=2e-5)


@pytest.fixture(scope="module")
def dense_logits(images):
    return functools.cache(lambda config: hvit_jax.jit_model(make(config, "dense"))(images))


@pytest.mark.parametrize(
    ("method", "kind"),
    on_every_kind([case for case in METHODS if CASES[case].neutral is not None]),
    scope="class",
)
def test_neutral_options_equal_dense(method, config, dense_logits, images):
    options = CASES[method].neutral
    # One cluster of all tokens, however many a kind of backbone has.
    whole = {each: config.num_tokens for each in options if each.endswith("cluster_size")}
    neutral = hvit_jax.create(config, name(method), seed=1, **{**options, **whole})
    np.testing.assert_allclose(hvit_jax.jit_model(neutral)(images), dense_logits(config), atol=2e-5)


@pytest.mark.parametrize(("method", "kind"), on_every_kind(BUDGETED), scope="class")
class TestBudgets:
    def test_without_any_a_line_says_that_nothing_is_saved(self, model, config):
        free, total = model.reducer, config.num_tokens
        blocks, said = len(free.budget_blocks(config)), []
        for budgets in (None, total, 2, (total,) * (blocks - 1) + (total - 1,)):
            warn_without_budgets(free.with_budgets(budgets), config, said.append)
        flag = "--" + free.budget_option.replace("_", "-")
        expected = (
            f"{free.name} saves nothing without {flag}: every block has room for all {total} "
            f"tokens; `hvit calibrate --method {free.name}` measures what it needs"
        )
        assert said == [expected, expected]
        warn_without_budgets(hvit_jax.make_reducer("evit"), config, said.append)
        assert len(said) == 2

    def test_as_many_as_tokens_change_nothing(self, method, config, model, logits, images):
        total = config.num_tokens
        whole = make(config, method, **{model.reducer.budget_option: total})
        np.testing.assert_array_equal(hvit_jax.jit_model(whole)(images), logits)

    def test_what_was_counted_is_just_enough(self, method, config, model, features, images):
        """Each block's largest count changes nothing; one less is reported where it was used."""
        reducer = model.reducer
        blocks = reducer.budget_blocks(config)
        needed = [reducer.counts(features.states[block]) for block in blocks]
        needed = [max(int(count.max()) for count in counts.values()) for counts in needed]
        assert all(2 < count < config.num_tokens for count in needed)

        def classify_within(*budgets):
            model = make(config, method, **{reducer.budget_option: budgets})
            return classify(model, images)

        logits, report = classify_within(*needed)
        np.testing.assert_allclose(logits, features.output, atol=2e-5)
        assert not any(column.any() for column in report.values())
        _, report = classify_within(needed[0] - 1, *needed[1:])
        assert all(column.any() for column in report.values())
