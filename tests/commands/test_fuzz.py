"""Mutated input of every kind: it is used or refused in one clear line, and nothing else happens.

`HVIT_FUZZ=20 pytest -s tests/commands/test_fuzz.py` runs twenty times as many cases and prints the
counts.
"""

import collections
import copy
import functools
import io
import json
import os
import random
import resource
import shutil
import string
import time

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import hvit_jax
from hvit_jax import InputError
from hvit_jax.checkpoint import read_description
from hvit_jax.commands import flags
from hvit_jax.commands.convert import main as convert
from hvit_jax.commands.flags import read_method_args
from hvit_jax.commands.main import COMMANDS, records
from hvit_jax.data.folder import read_folder
from hvit_jax.data.picture import MAX_PIXELS, PictureError, open_picture
from hvit_jax.data.preprocess import resize_and_crop
from tests.backbone_states import as_dinov2, as_dinov3, as_transformers_dinov3, timm_state
from tests.evaluation_setup import make_checkpoint
from tests.torch_files import swag_state

TIMES = int(os.environ.get("HVIT_FUZZ", "1"))
SECONDS = 20  # For one case, on a loaded machine; a hang would take for ever.
GROWTH = 1.5e9  # Bytes that the process may grow by over all cases of a kind.


class Counts:
    """Runs cases, and counts how they end."""

    def __init__(self, kind):
        self.kind, self.ends = kind, collections.Counter()
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(self, case, what):
        started = time.monotonic()
        try:
            case()
            self.ends["used"] += 1
        except InputError as error:
            assert str(error).strip(), what
            self.ends["refused"] += 1
        except SystemExit as error:  # --help
            assert error.code == 0, what
            self.ends["help"] += 1
        except Exception as error:
            pytest.fail(f"{self.kind}: {type(error).__name__}: {error}\n{what!r}")
        assert time.monotonic() - started < SECONDS, what

    def check(self, refused):
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory)
        print(f"{self.kind}: {dict(self.ends)}, {grown / 1e6:.0f} MB more")
        assert self.ends["refused"] >= refused
        assert grown < GROWTH


@pytest.fixture
def chance():
    return random.Random(0)


def mutated(data, chance):
    """Change bytes: flip, cut, insert, repeat or overwrite."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(max(1, len(data)))
        kind = chance.randrange(5)
        if kind == 0 and data:
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = chance.randbytes(chance.randrange(1, 9))
        elif kind == 3:
            data += data[place : place + 64]
        else:
            data[place : place + 4] = chance.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(data)


VALUES = [
    None, True, -1, 0, 1, 2**31, 2**70, 0.5, float("nan"), "", "x" * 300, "\n\x1b[31m", [], {},
]  # fmt: skip


def altered(content, chance):
    """Change one entry somewhere in what JSON can hold."""
    content = copy.deepcopy(content)
    place, key = None, None
    here = content
    while isinstance(here, (dict, list)) and here and (place is None or chance.random() < 0.8):
        place, key = here, chance.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = here[key]
    if place is None:
        return chance.choice(VALUES)
    if chance.random() < 0.2:
        del place[key]
    elif isinstance(place, dict) and chance.random() < 0.2:
        place[chance.choice(["", "args", "\n", "resolution "])] = chance.choice(VALUES)
    else:
        place[key] = chance.choice(VALUES)
    return content


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_pictures(chance, form):
    counts, file = Counts(form), io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)

    def decode(data):
        prepared = resize_and_crop(open_picture(io.BytesIO(data), "it"), (16, 24))
        assert prepared.shape == (16, 24, 3) and prepared.dtype == np.uint8

    for _ in range(60 * TIMES):
        data = mutated(file.getvalue(), chance)
        counts.run(lambda data=data: decode(data), data)
    counts.check(refused=1)


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM"])
def test_a_declared_size_is_looked_at_before_decoding(form):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, form)
    data = bytearray(file.getvalue())
    side = 1 + int(MAX_PIXELS**0.5)
    if form == "PNG":
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = __import__("zlib").crc32(data[12:29]).to_bytes(4, "big")
    elif form == "BMP":
        data[18:26] = side.to_bytes(4, "little") * 2
    else:
        data = data.replace(b"8 8", f"{side} {side}".encode(), 1)
    with pytest.raises(PictureError, match=f"it: {side} x {side} pixels are more than"):
        open_picture(io.BytesIO(bytes(data)), "it")


def test_method_files(tmp_path, chance):
    counts, path = Counts("method files"), tmp_path / "args.json"
    for index in range(300 * TIMES):
        method = chance.choice(sorted(hvit_jax.REDUCERS))
        reducer = hvit_jax.make_reducer(method).resolve(hvit_jax.ViTConfig.vit_b16())
        content = altered({"method": method, "args": reducer.options()}, chance)
        text = json.dumps(content).encode()
        text = mutated(text, chance) if index % 3 == 0 else text
        path.write_bytes(text)

        def read(method=method):
            made = hvit_jax.make_reducer(method, **read_method_args(path, method))
            made.resolve(hvit_jax.ViTConfig.vit_b16())

        counts.run(read, text)
    counts.check(refused=100)


def test_checkpoints(tmp_path, chance):
    """Whatever happened to a folder, it is refused, or gives the numbers that were written."""
    counts, whole = Counts("checkpoints"), make_checkpoint(tmp_path / "whole")
    images = jnp.ones((1, 16, 24, 3))
    intact = hvit_jax.load(whole)
    expected = np.asarray(intact(images))
    description = json.loads((whole / "model.json").read_text())
    for index in range(40 * TIMES):
        folder = tmp_path / str(index)
        shutil.copytree(whole, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = chance.choice(files)
        if index % 2:
            path = folder / "model.json"
            content = json.dumps(altered(description, chance)).encode()
        else:
            content = mutated(path.read_bytes(), chance)
        path.unlink() if index % 10 == 0 else path.write_bytes(content)

        def load(folder=folder):
            model = hvit_jax.load(folder)
            if model.config == intact.config:
                np.testing.assert_array_equal(model(images), expected)

        counts.run(load, (path.name, content[:200]))
        shutil.rmtree(folder)
    counts.check(refused=20)


def tensors(change, **options):
    """A state dict of another layout."""
    state = change(timm_state(scaled=True, **options)).items()
    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in state}


ROTARY = {"registers": 4, "table": None, "classes": 0}
STATES = [
    *[swag_state] * 3,
    functools.partial(tensors, dict),
    functools.partial(tensors, as_dinov2, head_width=2),
    functools.partial(tensors, as_dinov3, **ROTARY),
    functools.partial(tensors, as_transformers_dinov3, **ROTARY),
]


def test_state_dicts(tmp_path, chance, capsys):
    """Keys and tensors that are not what they should be; the file itself is whole."""
    counts, path = Counts("state dicts"), tmp_path / "in.torch"
    for index in range(60 * TIMES):
        state = chance.choice(STATES)()
        for _ in range(chance.choice([1, 1, 3])):
            key = chance.choice(list(state))
            value = state.pop(key)
            small = isinstance(value, torch.Tensor) and value.numel() < 1 << 20
            kind = chance.randrange(7) if small else 0
            if kind == 1:
                state[key + chance.choice(["", "x", ".weight", "\n"])] = value
            elif kind == 2:
                state[key] = value.reshape(-1)[: chance.randrange(value.numel() + 1)]
            elif kind == 3:
                state[key] = value.to(chance.choice([torch.int8, torch.float64, torch.complex64]))
            elif kind == 4:
                # Claims a terabyte, stores one number.
                state[key] = torch.zeros(1).expand(2**38)
            elif kind == 5:
                state[key] = chance.choice([None, "text", [1.0], {"a": value}, value.to_sparse()])
            elif kind == 6:
                state[key] = value * float("nan")
        torch.save(state if chance.random() < 0.8 else {"model": state}, path)
        out = tmp_path / f"out{index}"

        def run(out=out):
            status = convert([str(path), str(out), "--heads", "2"])
            message = capsys.readouterr().err
            assert status in (0, 2)
            if status:
                assert message.count("\n") == 1 and not out.exists()
                raise InputError(message)

        counts.run(run, list(state))
    counts.check(refused=40)


WORDS = [
    "--method", "--method=tome", "--r", "-r", "-b", "-j", "--dtype", "bfloat16", "--keep-rate",
    "--blocks", "--checkpoint", "--output", "out.json", "--rows", "all", "--sweep", "batch=1,8",
    "tome", "hourglass", "ats", "0.7", "-1", "1e400", "nan", "8,-0.5", "", "--", "-", "--help",
    "--resume", "--max-drop", "--target-speedup", "--plot", "x.png", "--pictures", "é\n", "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines(tmp_path, monkeypatch, chance, capsys, command):
    monkeypatch.chdir(tmp_path)
    counts, (_, record) = Counts(command), records()[command]
    for _ in range(100 * TIMES):
        words = chance.choices(WORDS, k=chance.randrange(1, 7))
        if chance.random() < 0.2:
            words.append("".join(chance.choices(string.printable, k=chance.randrange(1, 12))))

        def parse(words=words):
            found = flags.parse(record, words, program=f"hvit {command}", description="")
            again = flags.parse(record, found.words(), program=f"hvit {command}", description="")
            assert again == found

        counts.run(parse, words)
    counts.check(refused=40)


NAMES = ["val", "img_val", "a", "b\n", "ü\u202e", "x.png", "p.jpg", "\udcff"]


def test_folder_trees(tmp_path, chance):
    """Links that lead round in circles, odd names, and files that are no pictures."""
    counts = Counts("folder trees")
    for index in range(40 * TIMES):
        root = tmp_path / str(index)
        folders = [root]
        root.mkdir()
        for number in range(chance.randrange(1, 12)):
            parent = chance.choice(folders)
            name = chance.choice(
                ["val", "img_val", "a", "b\n", "ü\u202e", "x.png", "p.jpg", "\udcff"]
            )
            path = parent / f"{name}{number if chance.random() < 0.5 else ''}"
            if path.exists() or path.is_symlink():
                continue
            kind = chance.randrange(5)
            if kind == 0:
                path.symlink_to(chance.choice(folders), target_is_directory=True)
            elif kind == 1:
                path.symlink_to(root / "nowhere")
            elif kind == 2:
                Image.new("RGB", (4, 4)).save(path.with_name(path.name + ".png"))
            elif kind == 3:
                os.mkfifo(path)
            else:
                path.mkdir()
                folders.append(path)

        def read(root=root):
            folder = read_folder(root)
            assert len(folder.paths) == len(folder.labels) == len(set(folder.paths))

        counts.run(read, sorted(map(str, root.rglob("*"))))
    counts.check(refused=5)


def test_descriptions_name_no_size_beyond_reason(tmp_path):
    """A description may declare any sizes; none is allocated before the weights are looked at."""
    folder = make_checkpoint(tmp_path / "it")
    content = json.loads((folder / "model.json").read_text())
    for name in ("depth", "width", "mlp_width", "num_classes"):
        changed = copy.deepcopy(content)
        changed["config"][name] = 2**40
        (folder / "model.json").write_text(json.dumps(changed))
        with pytest.raises(InputError):
            read_description(folder)
            hvit_jax.load(folder)
