"""Models from golden checkpoints compute what timm, transformers and Meta's own code do."""

import jax
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from tests.golden_backbones import BACKBONES

PLACES = [(backbone, place) for backbone in BACKBONES for place in backbone.places]
REDUCED = [
    (backbone, method, options)
    for backbone in BACKBONES
    for method, options in backbone.about.get("reduced", {}).items()
]


def load(converted_backbone, backbone, place, *method, **options):
    known = place == "native" and backbone.about.get("native_known", True)
    shape = backbone.images(place).shape[1:3]
    where = {} if known else {"resolution": shape}
    model = hvit_jax.load(converted_backbone(backbone)[0], *method, **where, **options)
    assert model.config.image_shape == shape
    return model


def assert_close(found, expected, tolerance):
    slack = tolerance * max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=slack, rtol=0)


@pytest.mark.parametrize(
    ("backbone", "place"), PLACES, ids=[f"{each.folder.name}-{place}" for each, place in PLACES]
)
def test_parity_backbones(backbone, place, converted_backbone):
    """Outputs within 5e-5 and all final tokens within 1e-4, by name."""
    model = load(converted_backbone, backbone, place)
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, images):
        model = nnx.merge(graph, state)
        return model(images), model.tokens(images)

    output, tokens = run(state, backbone.images(place))
    expected = {
        name: backbone.expected[f"{place}/{name}"] for name in ("output", "patches", "tokens")
    }
    assert_close(output, expected["output"], 5e-5)
    assert_close(tokens.pop("patches"), expected["patches"], 1e-4)
    prefix = [each if each.ndim == 3 else each[:, None] for each in tokens.values()]
    assert sum(each.shape[1] for each in prefix) == backbone.about["num_prefix_tokens"]
    if prefix:
        # The order of the names is that of the tokens.
        found = np.concatenate(prefix, axis=1)
        assert_close(found, expected["tokens"][:, : found.shape[1]], 1e-4)


@pytest.mark.parametrize(
    ("backbone", "method", "options"),
    REDUCED,
    ids=[f"{backbone.folder.name}-{method}" for backbone, method, _ in REDUCED],
)
def test_parity_of_merging_equal_tokens(backbone, method, options, converted_backbone):
    """Pictures of two kinds of patches without positions: tokens of a kind are equal."""
    model = load(converted_backbone, backbone, "native", method, **options)
    output = hvit_jax.jit_model(model)(backbone.images("native"))
    assert model.reducer.schedule(model.config)[-1].tokens_out < model.config.num_tokens
    assert_close(output, backbone.expected["native/output"], 5e-5)
