"""Which preprocessing a converted model gets: no file tells, so it is assumed and said."""

import pytest

from hvit_jax import MODELS, InputError, ViTConfig
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.convert import main
from hvit_jax.config import as_pair
from hvit_jax.convert import convert_file, export_file
from hvit_jax.convert.families import preprocessing_of
from hvit_jax.data.preprocess import resized_size
from hvit_jax.pictures import Preprocessing
from tests.torch_files import as_torchvision, save, swag_state

SWAG = Preprocessing(crop_pct=1.0, interpolation="bicubic")
TORCHVISION = Preprocessing(crop_pct=0.875, interpolation="bilinear")


def state_of(resolution, *, vision):
    """A state dict of a tiny model whose patches are 56 pixels wide."""
    state = swag_state(patch=56, positions=1 + (resolution // 56) ** 2)
    return as_torchvision(state) if vision else state


@pytest.mark.parametrize(
    "name, resolution, expected",
    [
        ("vit_b_16-c867db91.pth", 224, TORCHVISION),
        ("mine.pth", 224, TORCHVISION),
        ("vit_b_16_lc_swag-4e70ced5.pth", 224, SWAG),
        ("vit_b_16_swag-9ac1b537.pth", 336, SWAG),
        ("mine.pth", 336, SWAG),
    ],
)
def test_files_in_torchvisions_layout(tmp_path, capsys, name, resolution, expected):
    source = save(state_of(resolution, vision=True), tmp_path / name)
    assert main([str(source), str(tmp_path / "out"), "--heads", "2"]) == 0
    out = capsys.readouterr().out
    taken = "torchvision" if expected == TORCHVISION else "swag"
    assert f"preprocessing of {taken}; --preprocessing swag or torchvision says which\n" in out
    resized = "256 x 256, bilinear" if expected == TORCHVISION else f"{resolution} x {resolution}"
    assert f"pictures    resized to {resized}" in out
    description = read_description(tmp_path / "out")
    assert description.preprocessing == expected
    assert description.source["assumed"] == f"preprocessing of {taken}"


def test_files_in_swags_layout_need_no_assumption(tmp_path, capsys):
    source = save(state_of(224, vision=False), tmp_path / "in.torch")
    assert main([str(source), str(tmp_path / "out"), "--heads", "2"]) == 0
    out = capsys.readouterr().out
    assert "assumed" not in out
    assert "pictures    resized to 224 x 224, bicubic; cut to 224 x 224\n" in out
    assert read_description(tmp_path / "out").preprocessing == SWAG


@pytest.mark.parametrize("wanted, expected", [("swag", SWAG), ("torchvision", TORCHVISION)])
@pytest.mark.parametrize("vision", [False, True])
def test_the_option_decides(tmp_path, capsys, wanted, expected, vision):
    source = save(state_of(224, vision=vision), tmp_path / "in.pth")
    words = [str(source), str(tmp_path / "out"), "--heads", "2", "--preprocessing", wanted]
    assert main(words) == 0
    assert "assumed" not in capsys.readouterr().out
    assert read_description(tmp_path / "out").preprocessing == expected


def test_it_survives_the_way_to_pytorch_and_back(tmp_path):
    source = save(state_of(224, vision=True), tmp_path / "in.pth")
    convert_file(source, tmp_path / "first", heads=2)
    export_file(tmp_path / "first", tmp_path / "out.torch")
    back = convert_file(tmp_path / "out.torch", tmp_path / "second")
    assert back.preprocessing == TORCHVISION
    other = convert_file(tmp_path / "out.torch", tmp_path / "third", preprocessing="swag")
    assert other.preprocessing == SWAG


def test_unknown_name(tmp_path):
    source = save(state_of(224, vision=True), tmp_path / "in.pth")
    with pytest.raises(InputError, match="unknown preprocessing 'torchvison', did you mean"):
        convert_file(source, tmp_path / "out", heads=2, preprocessing="torchvison")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, side", [("vit_b16", 256), ("vit_l16", 242)])
def test_published_resizes_of_torchvision(name, side):
    """ViT_B_16_Weights and ViT_L_16_Weights, IMAGENET1K_V1: resize_size 256 and 242, crop 224."""
    body = {**vars(MODELS[name]), "resolution": 224}
    config = ViTConfig(**body)
    taken, prepared = preprocessing_of(None, "vit.pth", "torchvision", config)
    assert taken == "torchvision"
    assert resized_size((500, 500), as_pair(224), prepared) == (side, side)
