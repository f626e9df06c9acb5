"""A killed run continues as if nothing had happened; several devices train as one does."""

import shutil
import signal

import jax
import numpy as np
import pytest

from tests.scale_setup import EIGHT
from tests.training_setup import column, make_data, parameters, rows, train, train_elsewhere

OPTIONS = "--method evit --drop-locations 1 --accumulate 2 --ema 0.9 --layer-decay 0.7".split()
OPTIONS += "--rand-augment 2,9 --mixup 0.2 --cutmix 1".split()
OPTIONS += "-b 16 --epochs 12 --val-every 3 --log-every 2 --save-every 3 --remat".split()
KILLED = "signals_before_batch(10, signal.SIGKILL)"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), validation=5)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """A run without a break, on one device."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    with jax.default_matmul_precision("highest"):
        assert train(data, output, *OPTIONS) == 0
    return output


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """What a run has left that was killed in its eleventh step."""
    output = tmp_path_factory.mktemp("runs") / "killed"
    done = train_elsewhere(data, output, *OPTIONS, batches=KILLED)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(rows(output)) == 5 and not (output / "checkpoint").exists()
    return output


@pytest.fixture
def output(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run")


def test_a_killed_run_goes_on_exactly(data, straight, output, capsys):
    assert train(data, output, "--resume", *OPTIONS) == 0
    printed = capsys.readouterr()
    assert "from step 9" in printed.out or "from step 6" in printed.out
    assert printed.err == ""
    # 1.5 steps an epoch.
    assert column(straight, "step", "validation") == [5, 9, 14, 18]
    assert column(straight, "step") == list(range(2, 19, 2))
    for name in ("step", "epoch", "loss", "accuracy"):
        assert column(output, name) == column(straight, name)
    assert rows(output, "validation") == rows(straight, "validation")
    jax.tree.map(np.testing.assert_array_equal, parameters(output), parameters(straight))


def test_eight_devices_train_as_one_does(data, straight, tmp_path):
    output = tmp_path / "run"
    done = train_elsewhere(data, output, *OPTIONS, **EIGHT)
    assert done.returncode == 0, done.stderr
    assert "on 8 x cpu" in done.stdout
    for name, file in (("loss", "metrics"), ("loss", "validation"), ("top1", "validation")):
        np.testing.assert_allclose(
            column(output, name, file), column(straight, name, file), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("count", [1, 2])
def test_a_damaged_state_costs_the_steps_since_the_one_before(
    data, straight, output, capsys, count
):
    states = [path for path in (output / "state").iterdir() if path.name.isdecimal()]
    older, newest = sorted(states, key=lambda path: int(path.name))
    for state in (newest, older)[:count]:
        for path in (path for path in state.rglob("*") if path.is_file()):
            path.write_bytes(path.read_bytes()[:-1])
    status = train(data, output, "--resume", *OPTIONS)
    printed = capsys.readouterr()
    if count == 2:
        assert status == 2 and newest.exists() and older.exists()
        assert "no state in" in printed.err.splitlines()[-1]
        return
    assert status == 0, printed.err
    assert f"the state of step {newest.name} cannot be read" in printed.out
    assert f"from step {older.name} " in printed.out
    assert not list((output / "state").glob(".*")) and (output / f"damaged-{newest.name}").is_dir()
    assert column(output, "loss") == column(straight, "loss")
