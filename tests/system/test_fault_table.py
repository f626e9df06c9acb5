"""Every command with every fault of disk, permission, pictures, workers and weights.

Whatever happens is one clear line and exit status 2; nothing half-written is left.
"""

import contextlib
import errno
import functools
import importlib
import os
import signal
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import hvit_jax
from hvit_jax.calibration import CalibrateConfig, calibrate
from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.commands import train as train_command
from hvit_jax.commands.flags import parse
from hvit_jax.evaluation.run import EvalConfig, Seams, evaluate
from hvit_jax.models.parameters import init_parameters
from hvit_jax.system import memory
from hvit_jax.training import train
from tests.evaluation_setup import make_pictures, no_room
from tests.torch_files import swag_state
from tests.training_setup import before_batch

CONFIG = hvit_jax.ViTConfig(16, patch_size=8, depth=2, width=8, heads=1, mlp_width=8, num_classes=2)
QUICK = ("--seconds", "0.001")
COMMANDS = ("eval", "train", "compare", "profile", "convert", "to-torch", "calibrate")
COMMANDS += ("visualize", "export")
WITH_PICTURES = ("eval", "train", "compare", "calibrate")
WITH_CHECKPOINT = tuple(name for name in COMMANDS if name != "convert")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Pictures, a checkpoint, and a PyTorch file."""
    folder = tmp_path_factory.mktemp("inputs")
    save_checkpoint(folder / "checkpoint", init_parameters(CONFIG, 0), Description(CONFIG))
    make_pictures(folder / "pictures", count=8, classes=2)
    torch.save(swag_state(), folder / "in.torch")
    return folder


def words(command, inputs, output, *more):
    """A command that reads `inputs` and writes into the folder `output`."""
    pictures, checkpoint = inputs / "pictures", ("--checkpoint", inputs / "checkpoint")
    few = ("-b", "2", "-j", "0")
    return {
        "eval": (pictures, *checkpoint, *few, "--output", output / "r.json"),
        "train": (
            *(pictures, *checkpoint, "--output", output / "run", *few),
            *("--epochs", "3", "--save-every", "100", "--log-every", "1"),
        ),
        "compare": (pictures, *checkpoint, *few, *QUICK, "--methods", "tome")
        + ("--output", output / "s.json"),
        "profile": (*checkpoint, "-b", "1", *QUICK, "--no-latency", "--output", output / "p.json"),
        "convert": (inputs / "in.torch", output / "converted", "--heads", "2"),
        "to-torch": ("--to-torch", inputs / "checkpoint", output / "out.torch"),
        "calibrate": (pictures, *checkpoint, *few, "--output", output / "c.json"),
        "visualize": (pictures / "c0" / "000.png", *checkpoint, "-o", output / "v.png"),
        "export": (*checkpoint, "--platforms", "cpu", "--output", output / "exported"),
    }[command] + more


@pytest.fixture
def complaint(capsys):
    """Run a command that must fail, and give its one line."""

    def run(command, *arguments, status=2):
        module = "convert" if command == "to-torch" else command
        main = importlib.import_module(f"hvit_jax.commands.{module}").main
        capsys.readouterr()
        found = main([str(word) for word in arguments])
        out, err = capsys.readouterr()
        print(command, found, err)
        assert found == status and "Traceback" not in err
        return err.splitlines()[-1] if status == 2 else out

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_full_disk(command, inputs, tmp_path, complaint):
    with no_room(0):
        line = complaint(command, *words(command, inputs, tmp_path))
    assert "cannot write " in line and str(tmp_path) in line
    assert os.strerror(errno.EFBIG) in line
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_in_training(inputs, tmp_path, complaint):
    """Settings and rows have room, a state has not."""
    with no_room(9000):
        line = complaint("train", *words("train", inputs, tmp_path))
    assert f"cannot write {tmp_path / 'run' / 'state'}: {os.strerror(errno.EFBIG)}" in line
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.skipif(not os.path.isdir("/sys"), reason="needs a folder that root cannot write")
def test_no_permission(command, inputs, complaint):
    """Not even root may write there."""
    line = complaint(command, *words(command, inputs, Path("/sys")))
    assert "cannot write /sys/" in line


@pytest.mark.parametrize("command", WITH_CHECKPOINT)
def test_broken_weights(command, inputs, tmp_path, complaint):
    parameters = init_parameters(CONFIG, 0)
    scale = np.array(parameters["blocks"]["ln_1"]["scale"])
    scale[1, 3] = np.nan if len(command) % 2 else np.inf
    parameters["blocks"]["ln_1"]["scale"] = scale
    save_checkpoint(tmp_path / "checkpoint", parameters, Description(CONFIG))
    (tmp_path / "pictures").symlink_to(inputs / "pictures")
    (tmp_path / "out").mkdir()
    status = 1 if command == "profile" else 2
    line = complaint(command, *words(command, tmp_path, tmp_path / "out"), status=status)
    assert "NaN or infinite numbers in blocks/ln_1/scale of block 1" in line


@pytest.fixture
def with_a_bad_picture(inputs, tmp_path):
    """Pictures of which one is cut off."""
    for name in ("checkpoint", "in.torch"):
        (tmp_path / name).symlink_to(inputs / name)
    folder = make_pictures(tmp_path / "pictures", count=8, classes=2)
    whole = (folder / "c1" / "005.png").read_bytes()
    (folder / "c1" / "005.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.parametrize("command", WITH_PICTURES)
def test_a_picture_that_cannot_be_decoded(command, with_a_bad_picture, complaint):
    folder = with_a_bad_picture
    line = complaint(command, *words(command, folder, folder / "out"))
    assert "picture c1/005.png: " in line
    if command == "train":
        assert steps_saved(folder / "out") == [3]


def steps_saved(output):
    return [int(path.name) for path in (output / "run" / "state").glob("[0-9]*")]


def children():
    """The processes that this one has started, and that wait for pictures."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/cmdline") as line:
                parent, started = stat.read().rpartition(")")[2].split()[1], line.read()
        except OSError:
            continue
        if int(parent) == os.getpid() and "spawn_main" in started:
            found.append(int(name))
    return found


def reads(process, file):
    """Tell whether a process has a file open."""
    place = f"/proc/{process}/fd"
    with contextlib.suppress(OSError):
        return any(os.path.realpath(f"{place}/{each}") == str(file) for each in os.listdir(place))
    return False


@pytest.fixture
def with_a_killed_worker(with_a_bad_picture):
    """Pictures of which one takes a while to decode: who does it is killed."""
    folder, ended = with_a_bad_picture, threading.Event()
    large = folder.resolve() / "pictures" / "c1" / "005.png"
    Image.new("L", (9000, 9000)).save(large, compress_level=1)

    def kill():
        while not ended.wait(0.01):
            for child in children():
                if reads(child, large):
                    os.kill(child, signal.SIGKILL)
                    return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield folder
    ended.set()
    thread.join()


@pytest.mark.parametrize("command", [name for name in WITH_PICTURES if name != "train"])
def test_a_killed_worker(command, with_a_killed_worker, complaint):
    folder = with_a_killed_worker
    line = complaint(command, *words(command, folder, folder / "out", "-j", "1"))
    assert "a process that decodes pictures has died" in line


@pytest.fixture
def with_batches(monkeypatch):
    """Let `hvit train` take its batches from a function."""

    def replace(batches):
        monkeypatch.setattr(train_command, "train", functools.partial(train, batches=batches))

    return replace


def test_a_killed_worker_of_training(inputs, tmp_path, with_batches, complaint):
    """What had been decoded before is trained on, and the steps are saved."""
    with_batches(before_batch(3, lambda: [os.kill(each, signal.SIGKILL) for each in children()]))
    more = ("-j", "1", "--epochs", "100")
    line = complaint("train", *words("train", inputs, tmp_path / "out", *more))
    assert "a process that decodes pictures has died" in line
    (step,) = steps_saved(tmp_path / "out")
    assert step >= 3


EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB.\nmore"


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        (("-b", "8"), "at batch 8; try --accumulate 2, or --remat, or --batch-size 4"),
        (("-b", "6", "--accumulate", "3", "--remat"), "try --accumulate 6, or --batch-size 3"),
        (("-b", "1", "--remat"), "a smaller --resolution needs less"),
    ],
)
def test_training_out_of_memory(inputs, tmp_path, complaint, with_batches, more, advice):
    def full(*arguments, **options):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    with_batches(full)
    line = complaint("train", *words("train", inputs, tmp_path, *more))
    assert "out of memory at batch " in line and line.endswith(advice)
    assert os.listdir(tmp_path) == []


def test_evaluation_out_of_memory(inputs, tmp_path, complaint):
    def full(*arguments):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    config = parse(EvalConfig, list(map(str, words("eval", inputs, tmp_path))), "hvit eval")
    with pytest.raises(hvit_jax.InputError, match="at batch 2; try --batch-size 1"):
        evaluate(config, seams=Seams(full))
    assert os.listdir(tmp_path) == []


def test_calibration_out_of_memory(inputs, tmp_path):
    @contextlib.contextmanager
    def load(*arguments, **options):
        yield map(full, [0])

    def full(batch):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    chosen = list(map(str, words("calibrate", inputs, tmp_path)))
    config = parse(CalibrateConfig, chosen, program="x", description="")
    with pytest.raises(hvit_jax.InputError, match="at batch 2; try --batch-size 1"):
        calibrate(config, load=load)
    assert os.listdir(tmp_path) == []


def test_visualization_out_of_memory(inputs, tmp_path, complaint, monkeypatch):
    def full(*arguments):
        raise jax.errors.JaxRuntimeError(EXHAUSTED)

    monkeypatch.setattr("hvit_jax.visualization.run.compile_views", full)
    advice = "out of memory: RESOURCE_EXHAUSTED"
    assert advice in complaint("visualize", *words("visualize", inputs, tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_smaller_batch_suits_the_devices():
    assert memory.smaller_batch(64) == "try --batch-size 32"
    assert memory.smaller_batch(24, 8) == "try --batch-size 8"
    assert memory.smaller_batch(8, 8) == "no smaller batch is possible"
