"""Golden checkpoints of timm, transformers and Meta: what is found in them, and the way back.

That models compute what those libraries do is tested in tests/models.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from hvit_jax.checkpoint import load_parameters
from hvit_jax.convert import convert_file, export_file
from hvit_jax.convert.tasks import form_of, to_state
from tests.convert.arrays import arrays, assert_same_arrays
from tests.golden_backbones import BACKBONES, Backbone

# Keys of the goldens that no model needs.
IGNORED = ("mask_token", "text_model.", "text_projection.", "logit_")
RULES = {
    "timm": "bicubic_antialias",
    "transformers: bicubic, no antialias": "bicubic",
    "transformers: bicubic, antialias": "bicubic_antialias",
    "dinov2: bicubic, no antialias": "dinov2",
}


@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.folder.name)
def test_parity_golden_checkpoint_comes_back_bit_for_bit(backbone, converted_backbone):
    about, (folder, description) = backbone.about, converted_backbone(backbone)
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
        assert [config.position_resizing] == rule or config.registers
    assumed = description.source.get("assumed", "")
    assert not assumed or about["options"] or "preprocessing" in assumed

    parameters = load_parameters(folder, config)
    before = arrays(backbone.source)
    after = dict(to_state(parameters, form_of(description, None), config))
    passed = {key for key in before if any(word in key for word in IGNORED)}
    assert_same_arrays(after, {key: before[key] for key in before.keys() - passed})


@pytest.mark.parametrize("name", ["dinov2-original", "dinov3_vit-transformers"])
def test_written_file_tells_everything(name, tmp_path):
    """The way to PyTorch and back, through files, without options."""
    backbone = Backbone(Path(__file__).parents[1] / "backbones" / name)
    first = backbone.convert(tmp_path / "jax")
    export_file(tmp_path / "jax", tmp_path / "back.safetensors")
    again = convert_file(tmp_path / "back.safetensors", tmp_path / "again")
    assert (again.config, again.preprocessing) == (first.config, first.preprocessing)
    trees = [load_parameters(tmp_path / each, first.config) for each in ("jax", "again")]
    for leaf, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(leaf, other)
