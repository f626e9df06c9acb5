"""Several models in one file, and the dicts, prefixes and wrappers around their keys."""

import pytest
import torch

from hvit_jax import InputError
from hvit_jax.checkpoint import load_parameters, read_description
from hvit_jax.commands.convert import main
from hvit_jax.convert import convert_file
from hvit_jax.models.parameters import flatten
from tests.torch_files import as_torchvision, save, swag_state

PLAIN, AVERAGED = swag_state(seed=1), swag_state(seed=2)


def class_token(checkpoint):
    config = read_description(checkpoint).config
    return flatten(load_parameters(checkpoint, config))["class_token"]


def assert_holds(checkpoint, state):
    assert class_token(checkpoint).tolist() == state["class_token"].flatten().tolist()


def prefixed(state, prefix):
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "plain, averaged",
    [
        ("model", "model_ema"),
        ("state_dict", "state_dict_ema"),
        ("state_dict", "ema"),
        ("student", "teacher"),
    ],
)
def test_of_several_models_the_averaged_one_is_taken_and_all_are_named(
    tmp_path, capsys, plain, averaged
):
    content = {plain: PLAIN, averaged: AVERAGED, "optimizer": {"state": {0: {"step": 1}}}}
    source = save(content, tmp_path / "in.pth")
    assert main([str(source), str(tmp_path / "a"), "--heads", "2"]) == 0
    said = f"entry       {averaged} (also there: {plain}; --entry NAME takes another)"
    assert said in capsys.readouterr().out
    assert_holds(tmp_path / "a", AVERAGED)
    assert main([str(source), str(tmp_path / "p"), "--heads", "2", "--entry", plain]) == 0
    assert f"entry       {plain} (also there: {averaged};" in capsys.readouterr().out
    assert_holds(tmp_path / "p", PLAIN)
    source = read_description(tmp_path / "p").source
    assert (source["entry"], source["other_entries"]) == (plain, [averaged])


def test_torchvisions_own_training_file(tmp_path):
    """Its averaged model is torch.optim.swa_utils.AveragedModel's, with a counter beside it."""
    averaged = {"n_averaged": torch.tensor(7), **prefixed(AVERAGED, "module.")}
    source = save({"model": PLAIN, "model_ema": averaged, "epoch": 3}, tmp_path / "in.pth")
    convert_file(source, tmp_path / "default", heads=2)
    convert_file(source, tmp_path / "ema", heads=2, entry="model_ema")
    for each in ("default", "ema"):
        assert_holds(tmp_path / each, AVERAGED)
        found = read_description(tmp_path / each).source
        assert (found["entry"], found["ignored"]) == ("model_ema.module", ["n_averaged"])
    convert_file(source, tmp_path / "plain", heads=2, entry="model")
    assert_holds(tmp_path / "plain", PLAIN)


def test_models_side_by_side_in_one_state_dict(tmp_path):
    both = {**prefixed(PLAIN, "model."), **prefixed(AVERAGED, "ema_model.module.")}
    both["ema_model.n_averaged"] = torch.tensor(3)
    source = save({"state_dict": both, "callbacks": {}}, tmp_path / "lightning.ckpt")
    found = convert_file(source, tmp_path / "a", heads=2).source
    assert (found["entry"], found["ignored"]) == (
        "state_dict.ema_model.module",
        ["ema_model.n_averaged"],
    )
    assert_holds(tmp_path / "a", AVERAGED)
    convert_file(source, tmp_path / "p", heads=2, entry="state_dict.model")
    assert_holds(tmp_path / "p", PLAIN)


def test_model_without_a_name_is_the_entry_dot(tmp_path, capsys):
    source = save({**PLAIN, **prefixed(AVERAGED, "ema.")}, tmp_path / "in.pth")
    assert main([str(source), str(tmp_path / "a"), "--heads", "2"]) == 0
    assert "entry       ema (also there: .; --entry NAME" in capsys.readouterr().out
    assert_holds(tmp_path / "a", AVERAGED)
    assert main([str(source), str(tmp_path / "p"), "--heads", "2", "--entry", "."]) == 0
    assert "entry       . (also there: ema; --entry NAME" in capsys.readouterr().out
    assert_holds(tmp_path / "p", PLAIN)


@pytest.mark.parametrize("entry", ["model_emma", "optimizer", ""])
def test_entry_that_is_not_there(tmp_path, entry):
    source = save({"model": PLAIN, "model_ema": AVERAGED, "optimizer": {}}, tmp_path / "in.pth")
    with pytest.raises(InputError, match=rf"unknown entry '{entry}'.*known: model, model_ema\)"):
        convert_file(source, tmp_path / "out", heads=2, entry=entry)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("convention", [dict, as_torchvision])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "module._orig_mod.model.", "net.vit."],
)
def test_prefixes_nested_in_any_order(tmp_path, prefix, convention):
    source = save({"state_dict": prefixed(convention(PLAIN), prefix)}, tmp_path / "in.ckpt")
    convert_file(source, tmp_path / "out", heads=2)
    assert_holds(tmp_path / "out", PLAIN)
    convert_file(save(convention(PLAIN), tmp_path / "bare.pth"), tmp_path / "bare", heads=2)
    both = [
        flatten(load_parameters(tmp_path / each, read_description(tmp_path / each).config))
        for each in ("out", "bare")
    ]
    for name, leaf in both[0].items():
        assert leaf.tolist() == both[1][name].tolist(), name


def test_wrapped_parts_of_a_model(tmp_path):
    wrapped = {
        key.replace("layer_0.", "layer_0._orig_mod._checkpoint_wrapped_module."): tensor
        for key, tensor in PLAIN.items()
    }
    convert_file(save(wrapped, tmp_path / "in.pth"), tmp_path / "out", heads=2)
    assert_holds(tmp_path / "out", PLAIN)


def test_keys_beside_a_prefixed_model_are_left_over(tmp_path):
    state = {**prefixed(PLAIN, "model."), "criterion.weight": torch.ones(3)}
    with pytest.raises(InputError, match="; left over: criterion.weight$"):
        convert_file(save(state, tmp_path / "in.ckpt"), tmp_path / "out", heads=2)


def test_a_key_with_and_without_wrapper_is_refused(tmp_path):
    state = {**PLAIN, "_orig_mod.class_token": torch.zeros(1, 1, 6)}
    with pytest.raises(InputError, match="holds class_token twice"):
        convert_file(save(state, tmp_path / "in.pth"), tmp_path / "out", heads=2)


def test_dict_that_holds_itself_is_read(tmp_path):
    content = {"model": PLAIN}
    content["self"] = content
    description = convert_file(save(content, tmp_path / "in.pth"), tmp_path / "out", heads=2)
    assert description.source["entry"] == "model"


def test_names_of_entries_do_not_reach_the_terminal_raw(tmp_path, capsys):
    source = save({"model": PLAIN, "\x1b[31m\nred": AVERAGED}, tmp_path / "in.pth")
    assert main([str(source), str(tmp_path / "out"), "--heads", "2"]) == 0
    assert "entry       model (also there: \\x1b[31m; red; --entry" in capsys.readouterr().out
