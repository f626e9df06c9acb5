"""Golden pictures of any size: windows, views and padding, as the original codes give them."""

import dataclasses

import numpy as np
import pytest

import hvit_jax
from hvit_jax.dense import predict
from hvit_jax.dense.picture import layout_of, map_views, run_windows
from hvit_jax.pictures import Windows
from tests.dense_golden import DenseGoldens
from tests.golden import method_args

CONFIGS = DenseGoldens().description["configs"]
SLIDES = [name for name, about in CONFIGS.items() if "window" in about]
ODD = [name for name in CONFIGS if name.endswith("_odd")]
SHRUNK = 0.6  # The second view of `multi_*`.


def model_of(name, dense_checkpoint, resolution):
    about = CONFIGS[name]
    return hvit_jax.load(
        dense_checkpoint(about.get("like", name)),
        about["method"],
        resolution=resolution,
        restore=about.get("restore"),
        **method_args(about["args"]),
    )


def goldens_of(name, goldens):
    keys = [key for key in goldens.arrays.files if key.startswith(f"{name}/")]
    return {key.removeprefix(f"{name}/"): goldens.arrays[key] for key in keys}


def close(found, expected, atol):
    np.testing.assert_allclose(found.transpose(2, 0, 1), expected, atol=atol, rtol=0)


def same_labels(shares, labels, expected):
    """Labels where the best class is no tie."""
    best = np.sort(shares, axis=-1)
    decided = best[..., -1] - best[..., -2] > 1e-3
    np.testing.assert_array_equal(labels[decided], expected[decided])


@pytest.mark.parametrize("name", SLIDES)
def test_dense_parity_of_windows(name, dense_goldens, dense_checkpoint):
    about, golden = CONFIGS[name], goldens_of(name, dense_goldens)
    model = model_of(name, dense_checkpoint, about["window"])
    layout = layout_of(model, Windows(window=about["window"], stride=about["stride"]))
    picture, size = dense_goldens.pixels(about["images"])[0], tuple(about["ori_shape"])
    view = layout.view(picture, model.preprocessing.mean)
    shares = map_views(model, layout, [view], size, scores=True)
    close(shares[::3, ::3], golden["probabilities"], 1e-4)
    same_labels(shares, map_views(model, layout, [view], size), golden["labels"])
    if "logits" in golden:
        maps = run_windows(model, layout, list(layout.cut(view)), 2)
        rows, columns = layout.matrices(view, maps.shape[1:3], picture.shape[:2])
        laid = layout.assemble(view, maps)
        logits = np.einsum("yi,xj,ijn->yxn", rows, columns, laid, optimize=True)
        close(logits[::3, ::3], golden["logits"], 2e-4)
        mirrored = dataclasses.replace(view, mirrored=True)
        shares = map_views(model, layout, [mirrored], size, scores=True)
        close(shares[::7, ::7], golden["flipped_probabilities"], 1e-4)
    if "multi_labels" in golden:
        small = layout.view(shrunk(picture)[:, ::-1], model.preprocessing.mean)
        views = [view, dataclasses.replace(small, mirrored=True)]
        shares = map_views(model, layout, views, size, scores=True)
        close(shares[::5, ::5], golden["multi_probabilities"], 1e-4)
        same_labels(shares, map_views(model, layout, views, size), golden["multi_labels"])


def shrunk(picture):
    """Shrink as PyTorch does when it is given the factor, and not the size."""

    def along_rows(x):
        places = ((np.arange(int(len(x) * SHRUNK)) + 0.5) / SHRUNK - 0.5).clip(0, len(x) - 1)
        low = places.astype(int)
        share = (places - low).astype(np.float32)[:, None, None]
        return x[low] * (1 - share) + x[np.minimum(low + 1, len(x) - 1)] * share

    return along_rows(along_rows(picture).swapaxes(0, 1)).swapaxes(0, 1)


@pytest.mark.parametrize("name", ODD)
def test_dense_parity_of_pictures_that_are_padded(name, dense_goldens, dense_checkpoint):
    golden, about = goldens_of(name, dense_goldens), CONFIGS[name]
    picture = dense_goldens.pixels(about["images"])[0]
    patch = dense_goldens.description["nets"][about["net"]]["patch_size"]
    resolution = tuple(-(-side // patch) * patch for side in picture.shape[:2])
    model = model_of(name, dense_checkpoint, resolution)
    windows = Windows(short_side=0, window=resolution, stride=resolution, small="pad")
    layout = layout_of(model, windows)
    view = layout.view(picture, model.preprocessing.mean)
    masks = run_windows(model, layout, [view.pixels], 1)[0]
    close(masks, golden["masks"][0], 2e-4)
    rows, columns = layout.matrices(view, masks.shape[:2], picture.shape[:2])
    logits = np.einsum("yi,xj,ijn->yxn", rows, columns, masks, optimize=True)
    if "logits" in golden:
        close(logits, golden["logits"][0], 2e-4)
    same_labels(logits, predict(model, picture, windows=windows), golden["labels"][0])
