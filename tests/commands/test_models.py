"""hvit models: what is listed, of which names, and what the file holds."""

import json

import pytest

from hvit_jax.architectures import MODELS, architectures, buildable
from hvit_jax.catalogue import ModelsConfig, describe
from hvit_jax.commands.models import main
from hvit_jax.errors import InputError


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def listed(capsys, *words):
    """The names of the lines that a command line prints, and all of it."""
    assert main(words) == 0
    out = capsys.readouterr().out
    names = [line.split()[1] for line in out.splitlines() if line.startswith("│")]
    return list(dict.fromkeys(names)), out


def test_all_models_are_listed(capsys):
    names, out = listed(capsys)
    assert names == [*MODELS, *buildable()]
    assert "hf download timm/" in out and "hvit convert " in out


def test_a_part_of_the_name_or_a_pattern(capsys):
    names, out = listed(capsys, "giant_patch14_dinov2")
    assert names[0] == "vit_giant_patch14_dinov2" and "1,136.5" in out and "apache-2.0" in out
    names, _ = listed(capsys, "deit_*_224")
    assert set(names) > {"deit_base_distilled_patch16_224", "deit_tiny_patch16_224"}
    assert all(name.startswith("deit_") and name.endswith("_224") for name in names)


def test_a_whole_name_lists_all_weights(capsys):
    names, out = listed(capsys, "vit_base_patch14_dinov2")  # There are also ..._reg4_dinov2.
    assert names == ["vit_base_patch14_dinov2", "lvd142m", "(transformers)"]
    assert "timm/vit_base_patch14_dinov2.lvd142m" in out and "facebook/dinov2-base" in out
    names, out = listed(capsys, "vit_b16")
    assert "https://dl.fbaipublicfiles.com/SWAG/vit_b16_in1k.torch" in out
    assert "cc-by-nc-4.0" in out and "hf download" not in out


def test_what_cannot_be_built_says_why(capsys):
    assert main(["--unsupported"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        name for name in architectures() if name not in buildable()
    ]
    assert main(["--unsupported", "aimv2_1b_patch14_224"]) == 0
    assert "it needs" in (out := capsys.readouterr().out) and "RMSNorm" in out


def test_the_file_holds_all_weights(tmp_path, capsys):
    path = tmp_path / "models.json"
    assert main(["so400m_patch14_siglip_384", "-o", str(path)]) == 0
    (row,) = json.loads(path.read_text())["models"]
    assert row["resolution"] == [378, 378] and row["parameters"] == 428225600
    assert row["weights"][0]["found"].startswith("timm/vit_so400m_patch14_siglip_384.")
    assert "google/siglip-so400m-patch14-384" in row["transformers"]
    assert main(["-o", str(path)]) == 2 and "exists already" in capsys.readouterr().err


def test_nothing_found(capsys):
    assert main(["dinov9"]) == 2
    assert "no model's name matches 'dinov9'" in capsys.readouterr().err
    with pytest.raises(InputError, match="takes a name that ends in .json"):
        ModelsConfig(output="models.csv")


def test_gflops_of_the_published_size():
    assert describe("vit_l16").gflops == pytest.approx(364.8, abs=0.05)
