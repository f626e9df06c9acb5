"""Two processes train as one does, to tell pictures and pixels apart."""

import functools

import jax
import numpy as np
import pytest

from tests.scale_setup import finish, run_processes, started
from tests.training.test_segmentation import TASK, make_scenes
from tests.training_setup import RECIPE, SIZES, TRAIN, column, make_data, parameters, train

# Both get the signal of a scheduler, at different times.
STOPPED = """signals_before_batch(1 + int(sys.argv[-1]), signal.SIGTERM)"""
OPTIONS = "--accumulate 2 --ema 0.9 -b 12 --epochs 3".split()
OPTIONS += "--val-every 1 --log-every 1 --save-every 2 -j 0".split()


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("training"), validation=5)


@pytest.mark.slow  # A minute or two: several processes start, and train together.
def test_two_processes_train_as_one_does_and_resume(training, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(training, one, *OPTIONS) == 0
    command = (training, "--output", two, *SIZES, *RECIPE, *OPTIONS, "--shard-parameters")
    with started(TRAIN.format(batches=STOPPED), 2, *command) as processes:
        done = [finish(process) for process in processes]
    # The one that gets it later may stop with the other before it does.
    codes = {each.returncode for each in done}
    assert 143 in codes and codes <= {130, 143}, [each.stderr for each in done]
    assert not (two / "checkpoint").exists()
    done = run_processes(TRAIN.format(batches="training_batches"), 2, *command, "--resume")
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert "written: " in done[0].stdout and "written: " not in done[1].stdout
    assert "on 2 x cpu" in done[0].stdout
    assert column(two, "step") == column(one, "step")
    for name, file in (("loss", "metrics"), ("loss", "validation"), ("top1", "validation")):
        np.testing.assert_allclose(column(two, name, file), column(one, name, file), rtol=1e-4)
    # Keys' biases have no gradient, and Adam makes steps of its rounding.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=5e-4)
    jax.tree.map(close, parameters(two), parameters(one))


@pytest.mark.slow  # Half a minute: two processes start.
def test_two_processes_train_a_decoder_as_one_does(tmp_path):
    """Of three validation pictures one process has two, the other one."""
    scenes, one, two = make_scenes(tmp_path / "scenes"), tmp_path / "one", tmp_path / "two"
    options = [*TASK, "--epochs", 4, "--scale-range", "0.8,1.5", "-j", 0]
    assert train(scenes, one, *options) == 0
    command = (scenes, "--output", two, *SIZES, *options, "--shard-parameters")
    done = run_processes(TRAIN.format(batches="training_batches"), 2, *command)
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert "on 2 x cpu" in done[0].stdout
    for name, file in (("loss", "metrics"), ("miou", "validation"), ("aacc", "validation")):
        np.testing.assert_allclose(column(two, name, file), column(one, name, file), rtol=1e-3)
