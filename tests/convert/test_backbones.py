"""Golden checkpoints of timm, transformers and Meta: what is found in them, and the way back.

That models compute what those libraries do is tested in tests/models.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.progress import Progress

from hvit_jax.checkpoint import load_parameters
from hvit_jax.convert import convert_file, export_file
from hvit_jax.convert.reader import read_state_dict
from hvit_jax.convert.tasks import form_of, to_state

GOLDENS = Path(os.environ.get("HVIT_BACKBONE_GOLDENS", Path(__file__).parents[1] / "backbones"))
FOLDERS = sorted(path.parent for path in GOLDENS.glob("*/about.json"))
# Keys of the goldens that no model needs.
IGNORED = ("mask_token", "text_model.", "text_projection.", "logit_")
RULES = {
    "timm": "bicubic_antialias",
    "transformers: bicubic, no antialias": "bicubic",
    "transformers: bicubic, antialias": "bicubic_antialias",
    "dinov2: bicubic, no antialias": "dinov2",
}


def source_of(folder, about):
    """What is converted: the folder, or its file where it has no config.json."""
    bare = not (folder / "config.json").is_file()
    return folder / about["files"][0] if bare else folder


def arrays(path):
    read = read_state_dict(path, Progress(disable=True))
    return {key: read.read(key) for key in read.shapes if key not in read.flaws}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_parity_golden_checkpoint_comes_back_bit_for_bit(folder, tmp_path):
    about = json.loads((folder / "about.json").read_text())
    options = dict(zip(about["options"][::2], about["options"][1::2], strict=True))
    heads = int(options.get("--heads", 0)) or None
    description = convert_file(source_of(folder, about), tmp_path / "jax", heads=heads)
    config = description.config
    assert (config.heads, config.prefix_tokens, config.patch_size) == (
        about["num_heads"],
        about["num_prefix_tokens"],
        about["patch_size"],
    )
    if about.get("native_known", True):
        assert list(config.image_shape) == about["native"]
    if config.position_embedding:
        rule = [rule for words, rule in RULES.items() if about["resize"].startswith(words)]
        assert [config.position_resizing] == rule or "register" in folder.name
    assert (
        "assumed" not in description.source
        or heads
        or "preprocessing" in str(description.source["assumed"])
    )

    parameters = load_parameters(tmp_path / "jax", config)
    before = arrays(source_of(folder, about))
    after = dict(to_state(parameters, form_of(description, None), config))
    passed = {key for key in before if any(word in key for word in IGNORED)}
    assert before.keys() - passed == after.keys()
    for key, array in after.items():
        np.testing.assert_array_equal(array, before[key], err_msg=key)


@pytest.mark.parametrize("name", ["dinov2-original", "dinov3_vit-transformers"])
def test_written_file_tells_everything(name, tmp_path):
    """The way to PyTorch and back, through files, without options."""
    folder = Path(__file__).parents[1] / "backbones" / name
    about = json.loads((folder / "about.json").read_text())
    first = convert_file(source_of(folder, about), tmp_path / "jax", heads=3)
    export_file(tmp_path / "jax", tmp_path / "back.safetensors")
    again = convert_file(tmp_path / "back.safetensors", tmp_path / "again")
    assert (again.config, again.preprocessing) == (first.config, first.preprocessing)
    trees = [load_parameters(tmp_path / each, first.config) for each in ("jax", "again")]
    for leaf, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(leaf, other)
