"""Programs import hvit_jax; that changes nothing else in them."""

from tests.scale_setup import run_python

IMPORT = """
import logging, os, signal, sys, warnings
import flax.nnx, grain, jax, optax, orbax.checkpoint, PIL.Image, rich.console
def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    return (
        [(each.name, each.filters, each.handlers, each.level) for each in loggers],
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        (dict(os.environ), sys.unraisablehook, sys.excepthook, warnings.filters),
        jax.config.values,
    )
before = [str(part) for part in state()]
import hvit_jax
assert [str(part) for part in state()] == before
"""


def test_importing_the_package_changes_nothing_in_the_program():
    assert run_python(IMPORT).stderr == ""
