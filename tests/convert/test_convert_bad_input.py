"""Everything a user can give the converter that it must refuse in one clear line."""

import argparse
import os
import pickle
import sys
from collections import OrderedDict

import jax
import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import save_file as save_safetensors

from hvit_jax import ViTConfig
from hvit_jax.checkpoint import Description, load_parameters, read_description, save_checkpoint
from hvit_jax.commands.convert import main
from hvit_jax.convert import convert_file, export_file
from hvit_jax.models.parameters import abstract_parameters, flatten
from tests.torch_files import as_torchvision, save, swag_state


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the command; it must fail with one line and leave nothing behind."""

    def run(*arguments, status=2):
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        assert main([str(argument) for argument in arguments]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("hvit convert: ") and err.count("\n") == 1 and err.endswith("\n")
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run


def changed(**changes):
    """A state dict with some keys replaced; None removes one."""
    state = swag_state()
    for key, value in changes.items():
        state.pop(key, None) if value is None else state.update({key: value})
    return state


LN = "encoder.layers.layer_1.ln_2.bias"
CONTENTS = {
    "a list": ([1, 2], ["holds a list, not a state dict", "state_dict()"]),
    "a tensor": (torch.ones(3), ["holds a Tensor, not a state dict"]),
    "empty": ({}, ["an empty dict"]),
    "another model": ({"fc.weight": torch.ones(2)}, ["known format", "SWAG", "fc.weight"]),
    "other keys": ({1: 2, torch.ones(2): 3}, ["known format", "its keys: 1, <Tensor>"]),
    "key missing": (changed(**{LN: None}), [f"missing: {LN}"]),
    "class token missing": (changed(class_token=None), ["missing: class_token"]),
    "positions missing": (
        changed(**{"encoder.pos_embedding": None}),
        ["missing: encoder.pos_embedding"],
    ),
    "half a head": (
        changed(**{"head.layers.head.bias": None}),
        ["missing: head.layers.head.bias"],
    ),
    "key left over": (changed(extra=torch.ones(2)), ["left over: extra"]),
    "number left over": (changed(epoch=3), ["left over: epoch"]),
    "block left out": (
        {key.replace("layer_1", "layer_2"): value for key, value in swag_state().items()},
        ["missing: encoder.layers.layer_1.ln_1.weight,", "layer_1.mlp.linear_2.bias"],
    ),
    "wrong shape": (
        changed(class_token=torch.ones(1, 1, 7)),
        ["wrong shape: class_token is (1, 1, 7), not (1, 1, 6)\n"],
    ),
    "wrong rank": (
        changed(**{"encoder.pos_embedding": torch.ones(10, 6)}),
        ["encoder.pos_embedding is (10, 6), not"],
    ),
    "patches not square": (
        changed(**{"conv_proj.weight": torch.ones(6, 3, 4, 5)}),
        ["conv_proj.weight is (6, 3, 4, 5), not (6, 3, 4, 4)"],
    ),
    "grid not square": (swag_state(positions=9), ["9 positions", "square grid"]),
    "no patches": (swag_state(positions=1), ["1 positions", "square grid"]),
    "integers": (
        changed(**{LN: torch.ones(6, dtype=torch.int64)}),
        [f"unusable: {LN} is torch.int64, not float32"],
    ),
    "too large for float32": (
        changed(**{LN: torch.full((6,), 1e39, dtype=torch.float64)}),
        [f"{LN} holds NaN or infinite numbers, or too large ones for float32"],
    ),
    "complex numbers": (
        changed(**{LN: torch.ones(6, dtype=torch.complex64)}),
        [f"{LN} is torch.complex64, not float32"],
    ),
    "sparse": (changed(**{LN: torch.ones(6).to_sparse()}), [f"{LN} is a torch.sparse_coo tensor"]),
    "no tensor": (changed(**{LN: "text"}), [f"{LN} is of type str, not a tensor"]),
    "NaN": (
        changed(**{LN: torch.tensor([0, 1, float("nan"), 2, 3, 4])}),
        [f"{LN} holds NaN or infinite numbers"],
    ),
    "infinity": (
        changed(**{LN: torch.tensor([0, 1, float("-inf"), 2, 3, 4])}),
        [f"{LN} holds NaN or infinite numbers"],
    ),
    "terminal escapes": ({"\x1b[31m\nred": torch.ones(2)}, ["\\x1b[31m"]),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_wrong_content(tmp_path, refused, name):
    content, parts = CONTENTS[name]
    message = refused(save(content, tmp_path / "in.torch"), tmp_path / "out", "--heads", 2)
    for part in [str(tmp_path / "in.torch"), *parts]:
        assert part in message


def test_every_problem_is_listed_at_once(tmp_path, refused):
    state = as_torchvision(swag_state())
    del state["encoder.ln.bias"], state["encoder.layers.encoder_layer_0.mlp.3.bias"]
    state |= {"extra": torch.ones(1), "class_token": torch.ones(6)}
    state["conv_proj.bias"] = torch.ones(6, dtype=torch.uint8)
    state["heads.head.bias"] = torch.full((3,), torch.nan)
    message = refused(save(state, tmp_path / "in.pth"), tmp_path / "out", "--heads", 2)
    assert message == (
        f"hvit convert: {tmp_path}/in.pth does not hold a whole torchvision model; missing: "
        "encoder.layers.encoder_layer_0.mlp.3.bias, encoder.ln.bias; left over: extra; "
        "wrong shape: class_token is (6,), not (1, 1, 6); unusable: conv_proj.bias is torch.uint8, "
        "not float32, float16, bfloat16 or float64, heads.head.bias holds NaN or infinite numbers\n"
    )


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, refused, zipped, wrap):
    trap = tmp_path / "trap"
    content = {"model": {**swag_state(), "code": Code(trap)}} if wrap else Code(trap)
    torch.save(content, tmp_path / "in.torch", _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / "in.torch", tmp_path / "out", "--heads", 2)
    assert "refused: it holds posix.mkdir" in message and "run code" in message
    assert not trap.exists()


def test_code_inside_a_namespace_is_refused_and_not_run(tmp_path, refused):
    trap = tmp_path / "trap"
    content = {"model": swag_state(), "args": argparse.Namespace(lr=Code(trap))}
    message = refused(save(content, tmp_path / "in.pth"), tmp_path / "out", "--heads", 2)
    assert "refused: it holds posix.mkdir" in message
    assert not trap.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_pickle_with_code_is_refused_and_not_run(tmp_path, refused, protocol):
    trap = tmp_path / "trap"
    (tmp_path / "in.torch").write_bytes(pickle.dumps(Code(trap), protocol))
    message = refused(tmp_path / "in.torch", tmp_path / "out", "--heads", 2)
    assert "is refused: it holds" in message and "run code" in message
    assert not trap.exists()


def test_whole_module_is_refused_with_advice(tmp_path, refused):
    message = refused(save(torch.nn.Linear(2, 2), tmp_path / "in.torch"), tmp_path / "out")
    assert "holds torch.nn.modules.linear.Linear" in message
    assert "torch.save(model.state_dict(), PATH)" in message


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "truncated, damaged, or not a PyTorch checkpoint"),
        (b"<html>404</html>", "is not a PyTorch checkpoint"),
        (b"PK\x03\x04 and no more", "truncated, damaged"),
        (bytes(1000), "not a PyTorch checkpoint"),
    ],
)
def test_other_files(tmp_path, refused, content, part):
    (tmp_path / "in.torch").write_bytes(content)
    assert part in refused(tmp_path / "in.torch", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x10" + bytes(7) + b"{", None])
def test_other_safetensors_files(tmp_path, refused, content):
    if content is None:
        save_safetensors(swag_state(), tmp_path / "whole.safetensors")
        content = (tmp_path / "whole.safetensors").read_bytes()[:-1]
    (tmp_path / "in.safetensors").write_bytes(content)
    message = refused(tmp_path / "in.safetensors", tmp_path / "out", "--heads", 2)
    assert "in.safetensors is truncated, damaged, or not a safetensors file (" in message


def test_safetensors_with_wrong_content(tmp_path, refused):
    state = {**swag_state(), "mask": torch.ones(3, dtype=torch.int64), "extra": torch.ones(2)}
    state["class_token"] = state["class_token"].to(torch.float8_e4m3fn)
    state["encoder.ln.bias"] = torch.full((6,), torch.nan)
    save_safetensors(state, tmp_path / "in.safetensors")
    message = refused(tmp_path / "in.safetensors", tmp_path / "out", "--heads", 2)
    for part in (
        "left over: extra, mask;",
        "class_token is F8_E4M3, not float32, float16, bfloat16 or float64",
        "encoder.ln.bias holds NaN",
    ):
        assert part in message


def head_layers(**shapes):
    """A torchvision state dict whose head is other layers than one."""
    state = as_torchvision(swag_state(classes=0))
    return state | {
        f"{name}.{part}": torch.ones(shape if part == "weight" else shape[:1])
        for name, shape in shapes.items()
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "layers, named",
    [
        (
            {"heads.pre_logits": (8, 6), "heads.head": (3, 8)},
            "heads.pre_logits.weight, heads.pre_logits.bias; wrong shape: heads.head.weight",
        ),
        ({"heads.0": (6, 6), "heads.2": (3, 6)}, "heads.2.weight, heads.2.bias\n"),
        ({"heads.0": (6,), "heads.1": (3, 6)}, "heads.0.weight, heads.0.bias, heads.1.weight"),
    ],
)
def test_head_of_several_layers(tmp_path, refused, layers, named):
    source = save(head_layers(**layers), tmp_path / "in.pth")
    message = refused(source, tmp_path / "out", "--heads", 2)
    assert f"of a head with more layers than the one that is read: {named}" in message


def test_source_missing_or_no_file(tmp_path, refused):
    assert "in.torch does not exist" in refused(tmp_path / "in.torch", tmp_path / "out")
    assert "is a folder" in refused(tmp_path, tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file" in refused(tmp_path / "pipe", tmp_path / "out")
    save_small(tmp_path / "jax")
    assert "use --to-torch" in refused(tmp_path / "jax", tmp_path / "out")


def test_resolution(tmp_path, refused):
    source = save(swag_state(positions=13), tmp_path / "in.torch")
    for arguments, part in (
        (
            [],
            "expected 1 for CLS and a square grid of patches; another grid is given in pixels "
            "with --resolution",
        ),
        (
            ["--resolution", "8,32"],
            "13 positions; expected 1 for CLS and 2 x 8 patches as --resolution says; another",
        ),
        (["--resolution", "0,48"], "expected 1 for CLS and 0 x 12 patches"),
        (["--resolution", "a,b"], "--resolution must be a whole number or 2 whole numbers"),
    ):
        assert part in refused(source, tmp_path / "out", "--heads", 2, *arguments)


@pytest.mark.parametrize("own", ["{", "[]", '{"config": 3}', "[" * 100000, '{"config": {"a": 1}}'])
def test_damaged_words_of_our_own(tmp_path, refused, own):
    state = OrderedDict(swag_state())
    state._metadata = {"": {"hvit_jax": own}}
    message = refused(save(state, tmp_path / "in.pth"), tmp_path / "out", "--heads", 2)
    assert "in.pth: what hvit_jax wrote beside the weights is damaged: " in message


@pytest.mark.parametrize("metadata", [None, 3, {}, {"": {"version": 1}}, {"": {"hvit_jax": 3}}])
def test_words_of_others_are_passed_over(tmp_path, metadata):
    state = OrderedDict(swag_state())
    state._metadata = metadata
    source = save(state, tmp_path / "in.pth")
    assert main([str(source), str(tmp_path / "out"), "--heads", "2"]) == 0


def test_heads(tmp_path, refused, capsys):
    source = save(swag_state(), tmp_path / "in.torch")
    message = refused(source, tmp_path / "out")
    assert "--heads N" in message and "2 blocks of width 6 and MLP width 10" in message
    assert "width 6 is not divisible by 4 heads" in refused(source, tmp_path / "out", "--heads", 4)
    assert "heads must be at least 1" in refused(source, tmp_path / "out", "--heads", 0)
    assert "--heads must be a whole number, got 'two'" in refused(
        source, tmp_path / "out", "--heads", "two"
    )


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "required: SRC, DST"),
        (["in"], "required: DST"),
        (["in", "out", "more"], "unexpected argument 'more'"),
        (["in", "out", "--to", "x"], "unknown option --to, did you mean --to-torch?"),
        (["in", "out", "--to-torch", "--heads", "2"], "--heads is for reading PyTorch files"),
        (["in", "out", "--to-torch", "--resolution", "8"], "--resolution is for reading PyTorch"),
        (["in", "out", "--preprocessing", "tmm"], "--preprocessing must be one of"),
        (["in", "out", "--layout", "swag"], "--layout is for --to-torch"),
        (["in", "out", "--to-torch", "--layout", "tmm"], "--layout must be one of"),
    ],
)
def test_usage(refused, arguments, part):
    assert part in refused(*arguments)


def save_small(directory, scale=1.0):
    config = ViTConfig(8, patch_size=4, depth=1, width=4, heads=1, mlp_width=4, num_classes=2)
    shapes = abstract_parameters(config)
    parameters = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    parameters["ln"]["scale"] *= np.float32(scale)
    save_checkpoint(directory, parameters, Description(config))


def test_destination_that_exists_is_kept(tmp_path, refused):
    source = save(swag_state(), tmp_path / "in.torch")
    save_small(tmp_path / "jax")
    for taken in ("file", "link"):
        path = tmp_path / taken
        path.write_text("precious") if taken == "file" else path.symlink_to("nowhere")
        assert "exists already" in refused(source, path, "--heads", 2)
        assert "exists already" in refused("--to-torch", tmp_path / "jax", path)
    assert "exists already" in refused(source, tmp_path / "jax", "--heads", 2)
    assert (tmp_path / "file").read_text() == "precious"


def test_destination_that_cannot_be_written(tmp_path, refused, monkeypatch):
    source = save(swag_state(), tmp_path / "in.torch")
    save_small(tmp_path / "jax")
    below = source / "below"
    assert f"cannot write {below}" in refused(source, below, "--heads", 2)
    file = source / "below.torch"
    assert f"cannot write {file}" in refused("--to-torch", tmp_path / "jax", file)
    assert "too long" in refused(source, tmp_path / ("x" * 300), "--heads", 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hvit_jax.checkpoint.checksums", full)
    message = refused(source, tmp_path / "out", "--heads", 2)
    assert "out: No space left on device" in message


def test_disk_without_space(tmp_path, refused, monkeypatch):
    source = save(swag_state(), tmp_path / "in.torch")
    save_small(tmp_path / "jax")
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: type("Usage", (), {"free": 100, "total": usage.f_blocks})
    )
    for arguments in (
        [source, tmp_path / "o", "--heads", 2],
        ["--to-torch", tmp_path / "jax", "o.torch"],
    ):
        assert "no space left on the disk; it needs" in refused(*arguments)


def test_to_torch_bad_sources(tmp_path, refused):
    out = tmp_path / "out.torch"
    assert "nowhere does not exist" in refused("--to-torch", tmp_path / "nowhere", out)
    assert "is not a checkpoint" in refused("--to-torch", tmp_path, out)
    source = save(swag_state(), tmp_path / "in.torch")
    assert "is not a checkpoint" in refused("--to-torch", source, out)
    save_small(tmp_path / "nan", scale=np.nan)
    message = refused("--to-torch", tmp_path / "nan", out)
    assert f"{tmp_path}/nan" in message
    assert "NaN or infinite numbers in ln/scale" in message


def test_to_torch_refuses_other_endings(tmp_path, refused):
    save_small(tmp_path / "jax")
    for name in ("out.csv", "out"):
        line = (
            "hvit convert: a PyTorch file takes a name that ends in .torch, .pth, .pt, .bin, "
            f".safetensors, got {tmp_path / name}\n"
        )
        assert refused("--to-torch", tmp_path / "jax", tmp_path / name) == line
        assert not (tmp_path / name).exists()


def test_without_torch(tmp_path, refused, monkeypatch):
    source = save(swag_state(), tmp_path / "in.torch")
    save_small(tmp_path / "jax")
    monkeypatch.setitem(sys.modules, "torch", None)
    for arguments in (
        [source, tmp_path / "o"],
        ["--to-torch", tmp_path / "jax", tmp_path / "o.pth"],
    ):
        assert 'pip install "hvit-jax[convert]"' in refused(*arguments)


class Interrupted(Progress):
    """Shows nothing; Ctrl-C comes as a task begins."""

    def __init__(self, task):
        super().__init__(disable=True)
        self.task = task

    def add_task(self, description, *arguments, **options):
        if description == self.task:
            raise KeyboardInterrupt
        return super().add_task(description, *arguments, **options)


TASKS = ["checking checksums", "hashing", "checking numbers", "writing"]


@pytest.mark.parametrize("task", TASKS)
def test_interrupt_leaves_nothing(tmp_path, task):
    source = save(swag_state(), tmp_path / "in.torch")
    with pytest.raises(KeyboardInterrupt):
        convert_file(source, tmp_path / "out", heads=2, progress=Interrupted(task))
    assert [path.name for path in tmp_path.iterdir()] == ["in.torch"]


@pytest.mark.parametrize("task", TASKS)
def test_interrupt_of_to_torch_leaves_nothing(tmp_path, task):
    save_small(tmp_path / "jax")
    with pytest.raises(KeyboardInterrupt):
        export_file(tmp_path / "jax", tmp_path / "out.torch", progress=Interrupted(task))
    assert [path.name for path in tmp_path.iterdir()] == ["jax"]


def test_interrupt_while_the_checkpoint_is_written_leaves_nothing(tmp_path, refused, monkeypatch):
    source = save(swag_state(), tmp_path / "in.torch")

    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("hvit_jax.checkpoint.checksums", interrupt)
    message = refused(source, tmp_path / "out", "--heads", 2, status=130)
    assert message == "hvit convert: interrupted\n"


def test_truncated_files(tmp_path, refused):
    whole = save(swag_state(), tmp_path / "whole.torch").read_bytes()
    for length in [0, 1, 4, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1]:
        (tmp_path / "in.torch").write_bytes(whole[:length])
        message = refused(tmp_path / "in.torch", tmp_path / "out", "--heads", 2)
        assert f"{tmp_path}/in.torch is" in message and "not a PyTorch checkpoint" in message


@pytest.mark.parametrize("zipped", [True, False])
def test_flipped_bits_give_an_error_or_the_same_numbers(tmp_path, capsys, zipped):
    state, source = swag_state(depth=1, width=2, mlp=2, patch=1), tmp_path / "in.torch"
    torch.save(state, source, _use_new_zipfile_serialization=zipped)
    whole = bytearray(source.read_bytes())
    assert main([str(source), str(tmp_path / "good"), "--heads", "1"]) == 0
    config = read_description(tmp_path / "good").config
    good = flatten(load_parameters(tmp_path / "good", config))
    random = np.random.default_rng(0)
    failures = 0
    for number in range(60):
        place, bit = int(random.integers(len(whole))), 1 << int(random.integers(8))
        source.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        capsys.readouterr()
        out = tmp_path / f"out{number}"
        status = main([str(source), str(out), "--heads", "1"])
        err = capsys.readouterr().err
        if status == 0 and zipped:
            tree = flatten(load_parameters(out, config))
            assert all(np.array_equal(tree[name], good[name]) for name in good), place
        elif status != 0:
            failures += 1
            assert status == 2 and err.startswith("hvit convert: ") and err.count("\n") == 1, place
    assert failures > 20
