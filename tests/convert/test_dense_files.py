"""Files of models that make maps: Segmenter's folders, mmseg's files, heads beside a backbone."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

import hvit_jax
from hvit_jax import InputError
from hvit_jax.checkpoint import Description, load_parameters, save_checkpoint
from hvit_jax.config import Decoder
from hvit_jax.convert import convert_file, export_file
from hvit_jax.convert.heads import usual_taps
from hvit_jax.convert.variant import read_yaml
from hvit_jax.models.parameters import init_parameters
from hvit_jax.pictures import MEAN, Windows
from tests.convert.arrays import arrays, assert_same_arrays
from tests.dense_golden import FOLDER, DenseGoldens

GOLDENS = Path(__file__).parents[1] / "dense" / "goldens"
NETS = DenseGoldens().description["nets"]


@pytest.mark.parametrize("net", NETS)
def test_dense_parity_folders_come_back_bit_for_bit(net, tmp_path):
    about = NETS[net]
    description = convert_file(FOLDER / net, tmp_path / "jax")
    config, decoder = description.config, description.config.decoder
    assert list(config.image_shape) == about["image_size"]
    assert (config.heads, config.depth) == (about["n_heads"], about["n_layers"])
    assert (decoder.outputs, decoder.heads) == (about["n_cls"], about["decoder_heads"])
    assert decoder.depth == about["decoder"].get("n_layers", 0)
    assert config.distillation_token == about["distilled"]
    assert config.position_resizing == "bilinear"
    assert config.norm_eps == decoder.norm_eps == 1e-5
    kinds = {"vit": (0.5, 0.5, 0.5), "deit": MEAN}
    assert description.preprocessing.mean == kinds[about["normalization"]]
    windows = description.windows
    assert (windows.window, windows.stride) == (about["window"], about["stride"])
    assert "assumed" not in description.source
    assert "optimizer" in description.source["beside"]

    export_file(tmp_path / "jax", tmp_path / "back.pth")
    before, after = arrays(FOLDER / net / "checkpoint.pth"), arrays(tmp_path / "back.pth")
    assert_same_arrays(before, after)  # Of encoder.head only strides of 0 are stored.
    again = convert_file(tmp_path / "back.pth", tmp_path / "again")
    assert (again.config, again.windows) == (config, windows)
    same_parameters(tmp_path / "jax", tmp_path / "again", config)


def same_parameters(one, other, config):
    jax.tree.map(
        np.testing.assert_array_equal, load_parameters(one, config), load_parameters(other, config)
    )


def test_file_for_mmseg_is_the_folder(tmp_path):
    """The same weights under other keys, which mmseg runs with another epsilon and rule."""
    ours = convert_file(GOLDENS / "linear", tmp_path / "folder").config
    theirs = convert_file(GOLDENS / "mmseg_linear.pth", tmp_path / "file", heads=3)
    assert (theirs.config.norm_eps, theirs.config.position_resizing) == (1e-6, "bicubic")
    assert "--preprocessing" not in theirs.source["assumed"]
    assert theirs.source["assumed"] == "preprocessing of segmenter-vit"
    assert theirs.source["ignored"] == ["encoder.head.* (2 keys)"]
    same_parameters(tmp_path / "folder", tmp_path / "file", ours)
    export_file(tmp_path / "file", tmp_path / "back.safetensors")
    before = arrays(GOLDENS / "mmseg_linear.pth")
    after = load_file(tmp_path / "back.safetensors")
    assert_same_arrays(before, after)
    export_file(tmp_path / "folder", tmp_path / "other.safetensors", layout="segmenter-mmseg")
    assert load_file(tmp_path / "other.safetensors").keys() == after.keys()


def test_wrapped_model_and_options_of_the_code_that_ran_it(tmp_path):
    held = torch.load(GOLDENS / "mask" / "checkpoint.pth", weights_only=True)["model"]
    torch.save({"model": {f"module.{key}": each for key, each in held.items()}}, tmp_path / "a.pth")
    description = convert_file(
        *(tmp_path / "a.pth", tmp_path / "jax"),
        heads=4,
        norm_eps=1e-6,
        position_resizing="bicubic",
    )
    assert description.source["entry"] == "model.module"
    assert (description.config.norm_eps, description.config.position_resizing) == (1e-6, "bicubic")
    assert description.config.decoder == Decoder("mask", 7, depth=2)


@pytest.fixture
def segmenter(tmp_path):
    """Copy the golden folder with a linear decoder, with changes to what variant.yml says."""

    def make(**changes):
        folder = tmp_path / "segmenter"
        shutil.copytree(GOLDENS / "linear", folder)
        said = read_yaml(folder / "variant.yml")
        for name, value in changes.items():
            place = said["net_kwargs"] if name in said["net_kwargs"] else said
            place[name] = value
        (folder / "variant.yml").write_text(yaml.safe_dump(said))
        return folder

    return make


@pytest.mark.parametrize(
    ("data_set", "inference", "windows"),
    [
        ("ade20k", None, Windows(96, 384, 96, 96)),
        ("cityscapes", None, Windows(1024, 2048, 96, 512)),
        ("pascal_context", {"im_size": 520, "window_size": 96}, Windows(520, 4160, 96, 320)),
        ("mine", {"window_stride": 32}, Windows(96, None, 96, 32)),
    ],
)
def test_windows_by_data_set(data_set, inference, windows, segmenter, tmp_path):
    folder = segmenter(dataset_kwargs={"dataset": data_set}, inference_kwargs=inference)
    description = convert_file(folder, tmp_path / "jax")
    assert description.windows == windows
    assert description.source["data_set"] == data_set


REFUSED = {
    "normalisation": (
        {"normalization": "clip"},
        ["normalization clip", "--preprocessing segmenter"],
    ),
    "decoder": ({"decoder": {"name": "upernet"}}, ["upernet", "linear, mask_transformer"]),
    "classes": ({"n_cls": 6}, ["variant.yml says decoder outputs 6", "have 5"]),
    "kind": ({"decoder": {"name": "mask_transformer"}}, ["decoder kind mask", "have linear"]),
    "width": ({"d_model": 40}, ["variant.yml says width 40", "have 36"]),
    "distilled": ({"distilled": True}, ["missing: encoder.dist_token"]),
    "a word for a size": ({"patch_size": "16"}, ["variant.yml says patch_size 16", "have 16"]),
    "no decoder": ({"net_kwargs": {}}, ["variant.yml is damaged: KeyError"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_variant_that_does_not_fit_is_refused(name, segmenter, tmp_path):
    changes, words = REFUSED[name]
    with pytest.raises(InputError) as refusal:
        convert_file(segmenter(**changes), tmp_path / "jax")
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_normalisation_is_settled_by_an_option(segmenter, tmp_path):
    folder = segmenter(normalization="clip")
    description = convert_file(folder, tmp_path / "jax", preprocessing="segmenter-deit")
    assert description.preprocessing.mean == MEAN


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.mkdir [made]", "more than plain values"),
        ("a: [", "is damaged"),
        ("- 1", "holds a list"),
    ],
)
def test_yaml_of_anything_but_plain_values_is_refused(text, words, tmp_path):
    (tmp_path / "variant.yml").write_text(text)
    with pytest.raises(InputError, match=words):
        read_yaml(tmp_path / "variant.yml")
    assert not Path("made").exists()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A backbone in DINOv2's layout whose width is that of the golden heads."""
    folder = tmp_path_factory.mktemp("backbone")
    config = hvit_jax.ViTConfig(56, 14, 12, 24, 2, 48, num_classes=0, layer_scale=True)
    save_checkpoint(folder / "jax", init_parameters(config, 0), Description(config))
    export_file(folder / "jax", folder / "own.safetensors", layout="dinov2")
    # As others write it: without what our files say beside the weights.
    save_file(load_file(folder / "own.safetensors"), folder / "backbone.safetensors")
    return folder / "backbone.safetensors"


@pytest.mark.parametrize(
    ("head", "kind", "taps"),
    [
        ("seg_linear", "bn_linear", (11,)),
        ("seg_ms", "bn_linear", (8, 9, 10, 11)),
        ("depth_linear4", "depth_linear", (2, 5, 8, 11)),
        ("depth_dpt", "depth_dpt", (2, 5, 8, 11)),
    ],
)
def test_head_comes_back_bit_for_bit(head, kind, taps, backbone, tmp_path):
    file = GOLDENS / f"dino_{head}.pth"
    description = convert_file(backbone, tmp_path / "jax", head=file, heads=2)
    decoder = description.config.decoder
    assert (decoder.kind, decoder.taps) == (kind, taps)
    assert description.preprocessing.mean == MEAN
    segments = Windows(short_side=512, window=512, stride=341)
    assert description.windows == (segments if kind == "bn_linear" else Windows())
    assert (head == "depth_dpt") == ("depth range" in description.source["assumed"])

    before = {key: array for key, array in arrays(file).items() if "num_batches" not in key}
    export_file(tmp_path / "jax", tmp_path / "body.pth", head=tmp_path / "head.pth")
    for original, part in ((arrays(backbone), "body.pth"), (before, "head.pth")):
        assert_same_arrays(arrays(tmp_path / part), original)
    again = convert_file(tmp_path / "body.pth", tmp_path / "again", head=tmp_path / "head.pth")
    assert (again.config, again.windows) == (description.config, description.windows)
    export_file(tmp_path / "jax", tmp_path / "whole.safetensors")
    whole = convert_file(tmp_path / "whole.safetensors", tmp_path / "third")
    assert whole.config == description.config


def test_taps_of_published_models():
    assert usual_taps("bn_linear", 4, 24) == (20, 21, 22, 23)
    assert usual_taps("depth_dpt", 4, 24) == (4, 11, 17, 23)
    assert usual_taps("depth_linear", 4, 40) == (9, 19, 29, 39)
    assert usual_taps("depth_linear", 1, 40) == (39,)


def test_range_of_depth_by_the_file(backbone, tmp_path):
    for name, most in (("x_nyu_dpt_head.pth", 10), ("x_kitti_dpt_head.pth", 80)):
        shutil.copy(GOLDENS / "dino_depth_dpt.pth", tmp_path / name)
        description = convert_file(backbone, tmp_path / f"{most}", head=tmp_path / name, heads=2)
        assert description.config.decoder.depth_range == (0.001, most)
        assert "depth range" not in description.source.get("assumed", "")


@pytest.mark.parametrize(
    ("head", "options", "words"),
    [
        ("seg_linear", {"taps": (1, 2)}, ["names 2 blocks", "dino_seg_linear.pth reads 1"]),
        ("seg_linear", {"taps": (12,)}, ["taps are blocks from 0 to 11, got (12,)"]),
        ("seg_linear", {"depth_range": (0.1, 1.0)}, ["--depth-range is for heads", "bn_linear"]),
        (None, {"taps": (1,)}, ["--taps is for heads", "no head"]),
        ("x_ms_head", {}, ["by its name it reads 4 blocks", "backbone.safetensors", "width 1"]),
        ("wide", {}, ["wide.pth does not fit the backbone", "backbone.safetensors", "72 channels"]),
        ("backbone", {}, ["holds more than a head, or none"]),
    ],
)
def test_head_that_does_not_fit_is_refused(head, options, words, backbone, tmp_path):
    file = GOLDENS / f"dino_{head}.pth"
    if head == "backbone":
        file = backbone
    elif head in ("x_ms_head", "wide"):
        state = torch.load(GOLDENS / "dino_seg_linear.pth", weights_only=True)["state_dict"]
        times = 3 if head == "wide" else 1
        wide = {
            key: torch.cat([each] * times, min(1, each.ndim - 1)) if each.shape[-1:] else each
            for key, each in state.items()
            if "conv_seg.bias" not in key
        }
        torch.save({**state, **wide}, file := tmp_path / f"{head}.pth")
    with pytest.raises(InputError) as refusal:
        convert_file(backbone, tmp_path / "jax", heads=2, head=head and file, **options)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_heads_alone_twice_or_for_nothing_are_refused(backbone, tmp_path):
    file = GOLDENS / "dino_seg_linear.pth"
    with pytest.raises(InputError, match="without its backbone; .* --head"):
        convert_file(file, tmp_path / "jax")
    with pytest.raises(InputError, match="has a head of its own"):
        convert_file(GOLDENS / "mmseg_linear.pth", tmp_path / "jax", heads=3, head=file)
    convert_file(GOLDENS / "linear", tmp_path / "jax")
    with pytest.raises(InputError, match="no head that stands beside its backbone"):
        export_file(tmp_path / "jax", tmp_path / "a.pth", head=tmp_path / "b.pth")


def test_broken_decoder_names_its_block(tmp_path):
    decoder = Decoder("mask", 3, depth=2)
    config = hvit_jax.ViTConfig(8, 8, 1, 8, 1, 16, decoder=decoder)
    parameters = jax.tree.map(np.array, init_parameters(config, 0))
    parameters["decoder"]["blocks"]["ln_1"]["bias"][1] = np.nan
    save_checkpoint(tmp_path / "jax", parameters, Description(config))
    with pytest.raises(InputError, match="in decoder/blocks/ln_1/bias of block 1"):
        load_parameters(tmp_path / "jax", config)
