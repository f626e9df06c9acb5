"""Checkpoints on disk: what is saved is loaded, and everything else is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError, ViTConfig
from hvit_jax.checkpoint import (
    Description,
    load_parameters,
    read_description,
    resize_parameters,
    save_checkpoint,
)
from hvit_jax.models.parameters import abstract_parameters, flatten
from hvit_jax.pictures import Preprocessing
from hvit_jax.system.files import checksums

CONFIG = ViTConfig((8, 12), patch_size=4, depth=2, width=4, heads=2, mlp_width=6, num_classes=3)
DESCRIPTION = Description(CONFIG, {"file": "a.torch", "epochs": 3}, ("cat", "dog", "owl"))


def random_parameters(config=CONFIG):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), abstract_parameters(config)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(directory, random_parameters(), DESCRIPTION)
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(directory, **changes):
    """Change entries of model.json; None removes one."""
    path = directory / "model.json"
    text = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in text.items() if value is not None}))


def edit_config(directory, **changes):
    edit(
        directory,
        config={**json.loads((directory / "model.json").read_text())["config"], **changes},
    )


def test_what_is_saved_is_loaded(saved):
    assert read_description(saved) == DESCRIPTION
    loaded, wanted = flatten(load_parameters(saved, CONFIG)), flatten(random_parameters())
    assert loaded.keys() == wanted.keys()
    for name, array in loaded.items():
        assert isinstance(array, np.ndarray) and array.dtype == np.float32
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def test_preprocessing_is_stored_and_swags_where_it_is_missing(tmp_path, copy):
    preprocessing = Preprocessing(
        0.875, "squash", "timm", "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    )
    save_checkpoint(tmp_path / "c", random_parameters(), Description(CONFIG, {}, (), preprocessing))
    assert read_description(tmp_path / "c").preprocessing == preprocessing
    edit(copy, preprocessing=None)
    assert read_description(copy).preprocessing == Preprocessing()
    edit(copy, preprocessing={"crop_pct": 0.9})
    assert read_description(copy).preprocessing == Preprocessing(crop_pct=0.9)


def test_only_the_checkpoint_is_left_beside_it(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "weights"]


def test_jax_arrays_in_bfloat16_are_loaded_as_float32(tmp_path):
    config = ViTConfig(8, patch_size=4, depth=1, width=4, heads=2, mlp_width=6, num_classes=0)
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_parameters(config))
    save_checkpoint(tmp_path / "c", low, Description(config))
    loaded, wanted = flatten(load_parameters(tmp_path / "c", config)), flatten(low)
    for name, array in loaded.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, np.asarray(wanted[name], np.float32))


def test_a_tree_that_is_not_the_models_is_not_saved(tmp_path):
    parameters = random_parameters()
    parameters["blocks"]["extra"] = np.ones(2, np.float32)
    parameters["ln"]["scale"] = np.ones(5, np.float32)
    del parameters["head"]
    with pytest.raises(InputError) as raised:
        save_checkpoint(tmp_path / "c", parameters, DESCRIPTION)
    for part in (
        "missing: head/bias, head/kernel",
        "left over: blocks/extra",
        "wrong shape: ln/scale is (5,), not (4,)",
    ):
        assert part in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise ValueError("RESOURCE_EXHAUSTED: no space\nand more lines")

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", full)
    with pytest.raises(InputError, match="cannot write .*c: ValueError: RESOURCE_EXHAUSTED: no sp"):
        save_checkpoint(tmp_path / "c", random_parameters(), DESCRIPTION)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(copy):
    before = checksums(copy)
    with pytest.raises(InputError, match="exists already"):
        save_checkpoint(copy, random_parameters(), DESCRIPTION)
    assert checksums(copy) == before


def refusal(directory, **options):
    with pytest.raises(InputError) as raised:
        hvit_jax.load(directory, **options)
    return str(raised.value)


def test_no_checkpoint(tmp_path):
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")
    assert "is not a checkpoint: it has no model.json" in refusal(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    assert refusal(tmp_path).endswith(f"; {tmp_path / 'checkpoint'} may be one")
    (tmp_path / "file").touch()
    assert "file is not a checkpoint" in refusal(tmp_path / "file")
    (tmp_path / "model.json").mkdir()
    assert "is not a checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "KeyError: 'format_version'"),
        ("[" * 100_000, "is damaged"),
        (b"\xff\xfe\x00", "is damaged: UnicodeDecodeError"),
    ],
)
def test_damaged_json(copy, text, part):
    content = text if isinstance(text, bytes) else text.encode()
    (copy / "model.json").write_bytes(content)
    message = refusal(copy)
    assert f"{copy}/model.json" in message and part in message


@pytest.mark.parametrize("length", [1, 50, 200, 600])
def test_truncated_json(copy, length):
    content = (copy / "model.json").read_text()
    assert length < len(content)
    (copy / "model.json").write_text(content[:length])
    assert "model.json is damaged: JSONDecodeError" in refusal(copy)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"format_version": 2}, "format version 2, this release reads 1"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": None}, "KeyError: 'format_version'"),
        ({"config": None}, "KeyError: 'config'"),
        ({"config": {"resolution": 8}}, "TypeError: "),
        ({"config": [1]}, "is damaged"),
        ({"source": "text"}, "is damaged"),
        ({"classes": 3}, "is damaged"),
        ({"classes": ["cat", "dog", "cat"]}, "2 different classes for 3 outputs"),
        ({"classes": ["cat", "dog"]}, "2 different classes for 3 outputs"),
        ({"preprocessing": {"crop_pct": 2}}, "crop_pct must be above 0 and at most 1, got 2"),
        ({"preprocessing": {"colour": 1}}, "Preprocessing has no colour"),
        ({"preprocessing": [1]}, "is damaged"),
        ({"weights": None}, "KeyError: 'weights'"),
        ({"weights": {"d": {}}}, "KeyError: 'bytes'"),
        ({"weights": {"d": {"bytes": "x", "crc32": 0}}}, "is damaged"),
    ],
)
def test_wrong_entries_of_json(copy, changes, part):
    edit(copy, **changes)
    message = refusal(copy)
    assert f"{copy}/model.json" in message and part in message


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"depth": 0}, "depth must be at least 1 and at most 1048576, got 0"),
        ({"depth": "2"}, "depth"),
        ({"heads": 3}, "width 4 is not divisible by 3 heads"),
        ({"resolution": [8, 9]}, "resolution 9 is not a multiple of the patch size 4"),
        ({"resolution": [8, 8, 8]}, "one or two whole numbers"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_sizes_in_json(copy, changes, part):
    edit_config(copy, **changes)
    message = refusal(copy)
    assert f"{copy}/model.json" in message and part in message


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"num_classes": 0}, ["left over: head/bias, head/kernel"]),
        ({"num_classes": 7}, ["head/bias is (3,), not (7,)", "head/kernel is (4, 3), not (4, 7)"]),
        ({"depth": 3}, ["blocks/ln_1/bias is (2, 4), not (3, 4)", "blocks/out_proj/kernel"]),
        ({"resolution": [8, 8]}, ["wrong shape: pos_embedding is (7, 4), not (5, 4)"]),
    ],
)
def test_weights_of_another_model(copy, changes, parts):
    edit(copy, classes=[])
    edit_config(copy, **changes)
    message = refusal(copy)
    for part in [str(copy), *parts]:
        assert part in message


def test_weights_without_a_head(tmp_path):
    config = ViTConfig((8, 12), 4, depth=2, width=4, heads=2, mlp_width=6, num_classes=0)
    save_checkpoint(tmp_path / "c", random_parameters(config), Description(config))
    assert hvit_jax.load(tmp_path / "c").head is None
    edit_config(tmp_path / "c", num_classes=3)
    assert "missing: head/bias, head/kernel" in refusal(tmp_path / "c")


def test_weights_missing_or_something_else(copy):
    shutil.rmtree(copy / "weights")
    assert "no folder weights" in refusal(copy)
    (copy / "weights").mkdir()
    assert "is damaged: in weights, " in refusal(copy)
    (copy / "weights" / "notes.txt").write_text("hello")
    edit(copy, weights=checksums(copy / "weights"))
    assert "is not a checkpoint: weights holds no Orbax tree" in refusal(copy)


def test_every_damaged_file_is_named_and_nothing_else_is_printed(saved, tmp_path, capfd):
    files = sorted(json.loads((saved / "model.json").read_text())["weights"])
    assert len(files) > 3
    for number, name in enumerate(files):
        for kind in ("missing", "empty", "short", "flipped"):
            copy = shutil.copytree(saved, tmp_path / f"{number}{kind}")
            path = copy / "weights" / name
            content = path.read_bytes()
            middle = len(content) // 2
            if kind == "missing":
                path.unlink()
            elif kind == "flipped":
                flipped = bytes([content[middle] ^ 4])
                path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
            else:
                path.write_bytes(content[: 0 if kind == "empty" else -1])
            message = refusal(copy)
            assert f"checkpoint {copy} is damaged: in weights, {name} " in message, kind
    assert capfd.readouterr() == ("", "")


def test_resolution(saved):
    assert "resolution 10 is not a multiple" in refusal(saved, resolution=10)
    assert "resolution 0" in refusal(saved, resolution=0)
    model = hvit_jax.load(saved, resolution=(16, 8))
    assert model.config.grid == (4, 2) and model.pos_embedding.shape == (9, 4)
    assert hvit_jax.load(saved).config == CONFIG


def test_resizing_changes_positions_alone():
    parameters = random_parameters()
    new = ViTConfig((16, 8), 4, depth=2, width=4, heads=2, mlp_width=6, num_classes=3)
    resized = resize_parameters(parameters, CONFIG, new)
    assert resized["pos_embedding"].shape == (9, 4)
    np.testing.assert_array_equal(resized["pos_embedding"][0], parameters["pos_embedding"][0])
    # With align_corners=True the corners of the grid stay where they are.
    np.testing.assert_allclose(
        resized["pos_embedding"][[1, 2, 7, 8]],
        parameters["pos_embedding"][[1, 3, 4, 6]],
        atol=1e-6,
    )
    assert all(resized[name] is parameters[name] for name in parameters if name != "pos_embedding")


def test_what_no_patch_covers_belongs_to_one_resolution():
    """SigLIP SO400M reads 378 of 384 pixels; at 392 its patches cover all."""
    config = ViTConfig(378, patch_size=14, depth=1, width=8, heads=1, mlp_width=8)
    description = Description(config, preprocessing=Preprocessing(uncovered=(6, 6)))
    assert description.at(None) == description.at(378) == description
    other = description.at((392, 378))
    assert other.config.image_shape == (392, 378) and other.preprocessing.uncovered == (0, 0)
    message = "resolution 384 is not a multiple of the patch size 14; the nearest that is: 378"
    with pytest.raises(InputError, match=message):
        description.at(384)
