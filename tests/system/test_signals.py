"""Signals that libraries lose or turn into something else."""

import pytest

from hvit_jax.system.run import run
from hvit_jax.system.signals import Stopped, sigterm_raises, unmasked


def test_a_signal_that_c_code_made_a_system_error_of_is_raised_itself():
    with pytest.raises(Stopped, match="by SIGTERM"), unmasked():
        masked()


def masked():
    try:
        raise Stopped("stopped by SIGTERM")
    except Stopped as error:
        raise SystemError("returned a result with an exception set") from error


def test_every_command_ends_as_by_the_signal(capsys):
    assert run(masked, "hvit eval") == 143
    assert capsys.readouterr().err == "hvit eval: stopped by SIGTERM\n"
    with pytest.raises(Stopped), sigterm_raises():
        masked()


def test_other_system_errors_pass():
    with pytest.raises(SystemError, match="of another kind"), unmasked():
        raise SystemError("of another kind")
