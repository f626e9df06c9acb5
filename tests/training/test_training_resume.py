"""A killed run goes on as if nothing had happened; several devices train as one does."""

import signal

import jax
import numpy as np
import pytest

from tests.training_setup import column, make_data, parameters, rows, train_elsewhere

OPTIONS = "--method evit --drop-locations 1 --accumulate 2 --ema 0.9 --layer-decay 0.7".split()
OPTIONS += "-b 16 --epochs 12 --val-every 3 --log-every 2 --save-every 3 --remat".split()
KILLED = """
import os, signal
from hvit_jax.training import run
whole = run.training_batches
def killed(*arguments, **options):
    for index, batch in enumerate(whole(*arguments, **options)):
        if index == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
run.training_batches = killed
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), validation=5)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run without a break, on one device."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    done = train_elsewhere(data, output, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return output


def test_a_killed_run_goes_on_exactly(data, straight, tmp_path):
    output = tmp_path / "run"
    killed = train_elsewhere(data, output, *OPTIONS, before=KILLED)
    assert killed.returncode == -signal.SIGKILL
    assert len(rows(output)) == 5 and not (output / "checkpoint").exists()
    resumed = train_elsewhere(data, output, "--resume", *OPTIONS)
    assert resumed.returncode == 0, resumed.stderr
    assert "from step 9" in resumed.stdout or "from step 6" in resumed.stdout
    # 1.5 steps an epoch.
    assert column(straight, "step", "validation") == [5, 9, 14, 18]
    assert column(straight, "step") == list(range(2, 19, 2))
    for name in ("step", "epoch", "loss", "accuracy"):
        assert column(output, name) == column(straight, name)
    assert rows(output, "validation") == rows(straight, "validation")
    jax.tree.map(np.testing.assert_array_equal, parameters(output), parameters(straight))


def test_eight_devices_train_as_one_does(data, straight, tmp_path):
    output = tmp_path / "run"
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = train_elsewhere(data, output, *OPTIONS, **eight)
    assert done.returncode == 0, done.stderr
    assert "on 8 x cpu" in done.stdout
    for name, file in (("loss", "metrics"), ("loss", "validation"), ("top1", "validation")):
        np.testing.assert_allclose(
            column(output, name, file), column(straight, name, file), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("count", [1, 2])
def test_a_damaged_state_costs_the_steps_since_the_one_before(data, straight, tmp_path, count):
    output = tmp_path / "run"
    killed = train_elsewhere(data, output, *OPTIONS, before=KILLED)
    assert killed.returncode == -signal.SIGKILL
    states = [path for path in (output / "state").iterdir() if path.name.isdecimal()]
    older, newest = sorted(states, key=lambda path: int(path.name))
    for state in (newest, older)[:count]:
        for path in (path for path in state.rglob("*") if path.is_file()):
            path.write_bytes(path.read_bytes()[:-1])
    resumed = train_elsewhere(data, output, "--resume", *OPTIONS)
    if count == 2:
        assert resumed.returncode == 2 and newest.exists() and older.exists()
        *noise, last = resumed.stderr.splitlines()
        assert "no state in" in last and all(line.startswith("ERROR:absl") for line in noise)
        return
    assert resumed.returncode == 0, resumed.stderr
    assert f"the state of step {newest.name} cannot be read" in resumed.stdout
    assert f"from step {older.name} " in resumed.stdout
    assert not list((output / "state").glob(".*")) and (output / f"damaged-{newest.name}").is_dir()
    assert column(output, "loss") == column(straight, "loss")
