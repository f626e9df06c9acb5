"""Every golden configuration of Segmenter, and every head, through the converter and the API."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.convert import convert_file, export_file
from hvit_jax.dense.picture import pad_evenly
from hvit_jax.models.decoders import Tap
from hvit_jax.models.parameters import init_parameters
from hvit_jax.ops.resizing import resize_map
from tests.dense_golden import DenseGoldens
from tests.golden import method_args, recorded_draws

GOLDENS = DenseGoldens()
PATCH = 14  # Of DINOv2.


def of_whole_windows(about):
    """Whether the pictures of a configuration are the model's input as they are."""
    if "net" not in about or "window" in about:
        return False
    patch = GOLDENS.description["nets"][about["net"]]["patch_size"]
    return not any(side % patch for side in GOLDENS.pixels(about["images"]).shape[1:3])


CONFIGS = {
    name: about for name, about in GOLDENS.description["configs"].items() if of_whole_windows(about)
}


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_parity(name, dense_goldens, dense_checkpoint):
    about = CONFIGS[name]
    images = dense_goldens.images(name)
    model = hvit_jax.load(
        dense_checkpoint(name),
        about["method"],
        resolution=images.shape[1:3],
        restore=about["restore"],
        **method_args(about["args"]),
    )
    draws = recorded_draws(dense_goldens.arrays, name, model.reducer.draws(model.config))
    found = compute(model, images, draws)
    golden = {
        key.removeprefix(f"{name}/"): dense_goldens.arrays[key]
        for key in dense_goldens.arrays.files
        if key.startswith(f"{name}/")
    }
    counts = [each.shape[1] for each in found["tokens"]]
    if about["restore"] == "block":  # Counted before the full grid comes back there.
        place = about["args"]["reconstruct_location"]
        assert counts[place] == images[0].size // (3 * model.config.patch_size**2) + 1
        counts[place] = counts[place - 1]
        golden.pop(f"block_{place}", None)
    assert counts == about.get("tokens_after_block", counts)
    for key, expected in golden.items():
        if key.startswith("block_"):
            close(found["tokens"][int(key.removeprefix("block_"))][:1], expected, key)
        elif key in ("encoded", "features"):
            close(found[key][:1], expected, key)
        elif key == "logits":
            close(found[key][:1].transpose(0, 3, 1, 2), expected, key)
        elif key in ("masks", "masks_decoder"):
            close(found[key].swapaxes(1, 2).reshape(expected.shape), expected, key)
    best = np.sort(found["logits"], axis=-1)
    decided = best[..., -1] - best[..., -2] > 1e-3
    assert decided.mean() > 0.5
    labels = found["logits"].argmax(-1)
    np.testing.assert_array_equal(labels[decided], golden["labels"][decided])


def compute(model, images, draws):
    """Compute all that goldens hold of a model, in one program; masks as (B, N, n)."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, images, draws):
        model = nnx.merge(graph, state)
        seen = model.features(images, draws=draws)
        prefix, last = model.config.prefix_tokens, seen.states[-1]
        tokens = seen.tokens
        if model.reducer.name == "evo":  # Its patches change their places; the original's do not.
            tokens = [
                jnp.concatenate([x[:, :prefix], model.reducer.restore(x, state)], axis=1)
                for x, state in zip(tokens, seen.states, strict=True)
            ]
        found = {"tokens": tokens, "encoded": model.ln(tokens[-1]), "logits": seen.output}
        found["masks"] = seen.masks.reshape(len(images), -1, seen.masks.shape[-1])
        found["masks_decoder"] = model.decoder(found["encoded"][:, prefix:])
        if last.dropped is not None:
            last = dataclasses.replace(last, dropped=model.ln(last.dropped))
        found["features"] = model.reducer.restore(model.ln(seen.tokens[-1]), last)
        return found

    return jax.tree.map(np.asarray, run(state, jnp.asarray(images), draws))


def close(found, expected, what):
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0, err_msg=what)


@pytest.fixture(scope="module")
def backbone(dense_goldens, tmp_path_factory):
    """A file in DINOv2's layout of a backbone that the golden heads fit."""
    folder = tmp_path_factory.mktemp("backbone")
    about = dense_goldens.heads["features"]
    height, width = (PATCH * side for side in about["grid"])
    depth = 1 + max(max(head["taps"]) for head in heads().values())
    config = hvit_jax.ViTConfig(
        (height, width),
        PATCH,
        depth=depth,
        width=about["channels"],
        heads=2,
        mlp_width=2 * about["channels"],
        layer_scale=True,
        position_resizing="dinov2",
    )
    save_checkpoint(folder / "jax", init_parameters(config, 0), Description(config))
    export_file(folder / "jax", folder / "backbone.safetensors", layout="dinov2")
    return folder / "backbone.safetensors"


def heads():
    return {name: head for name, head in GOLDENS.heads.items() if "head" in head}


@pytest.mark.parametrize("name", heads())
def test_dense_parity_heads(name, dense_goldens, backbone, tmp_path):
    head, arrays = dense_goldens.heads[name], dense_goldens.head_arrays
    metres = [float(head[end]) for end in ("min_depth", "max_depth") if end in head]
    description = convert_file(
        backbone,
        tmp_path / "jax",
        head=dense_goldens.folder / head["file"],
        taps=tuple(head["taps"]),
        depth_range=tuple(metres) or None,
    )
    assert description.source["head"]["file"] == head["file"]
    model = hvit_jax.load(tmp_path / "jax")
    taps = [Tap(last(arrays[f"features/{i}"]), arrays[f"features/cls_{i}"]) for i in head["taps"]]
    found = jax.jit(lambda taps: model.decoder(taps))(jax.tree.map(jnp.asarray, taps))
    key = "logits" if model.config.decoder.task == "segmentation" else "depth"
    step = 2 if "every 2nd row" in head.get("note", "") else 1
    close(found[:, ::step, ::step], last(arrays[f"{name}/{key}_grid"]), "grid")
    full = resize_map(found[:1], tuple(head["size"]))
    close(full, last(arrays[f"{name}/{key}"]), "picture")


def last(array):
    """Move channels from the second place to the last."""
    return np.moveaxis(array, 1, -1)


def cases(prefix):
    names = {key.split("/")[0] for key in GOLDENS.head_arrays.files}
    return sorted(name for name in names if name.startswith(prefix))


@pytest.mark.parametrize("name", cases("pad_"))
def test_dense_parity_padding(name, dense_goldens):
    arrays = dense_goldens.head_arrays
    expected = last(arrays[f"{name}/out"])
    padded = pad_evenly(jnp.asarray(last(arrays[f"{name}/inp"])), expected.shape[1:3])
    np.testing.assert_array_equal(padded, expected)


@pytest.mark.parametrize("name", cases("resize_"))
def test_dense_parity_resizing(name, dense_goldens):
    arrays = dense_goldens.head_arrays
    _, rule, _ = name.split("_")
    expected = last(arrays[name])
    rule = {"corners": "bilinear_corners"}.get(rule, rule)
    found = resize_map(jnp.asarray(last(arrays["resize/inp"])), expected.shape[1:3], rule)
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)
