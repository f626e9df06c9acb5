import functools
import gc
import getpass
import os
import shutil
import signal
import tempfile
from pathlib import Path

# Imported modules are a million objects; looking through them for garbage takes half a second each
# time, after every module of tests too. See pytest_collection_finish.
gc.disable()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Plain machine code for a CPU is made in a ninth of the time, which would else be most of the
# tests'; what a program computes, and the memory that is planned for it, is decided before.
# `nox -s optimized` tests the code that users run.
if os.environ["JAX_PLATFORMS"] == "cpu":
    if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0":
        # Fused operations without many passes over each; a program in one part, not in 32.
        plain = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
        os.environ.setdefault("XLA_FLAGS", f"{plain} --xla_cpu_parallel_codegen_split_count=1")
# Tests, and the commands that they start, compile the same small programs again and again.
PROGRAMS = Path(tempfile.gettempdir(), f"hvit_jax-tests-{getpass.getuser()}")
alone = "PYTEST_XDIST_WORKER" not in os.environ
if alone and sum(path.stat().st_size for path in PROGRAMS.glob("*-cache")) > 5e8:
    shutil.rmtree(PROGRAMS)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(PROGRAMS)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

from jaxtyping import install_import_hook

install_import_hook("hvit_jax", "beartype.beartype")

import jax
import pytest
from hypothesis import HealthCheck, settings

from hvit_jax.fields import Options
from hvit_jax.ops.attention import cudnn
from hvit_jax.system.programs import use_compilation_cache
from tests.golden import Goldens
from tests.small_models import SMALL

# A shell starts background commands with Ctrl-C ignored, and so their children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

use_compilation_cache()


def _unwrap(record):
    """Let options check themselves, with the error that users see, before the import hook does."""
    record.__init__ = getattr(record.__init__, "__wrapped__", record.__init__)
    for kind in record.__subclasses__():
        _unwrap(kind)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave a test to the slow run for the methods that its mark `slow_for` names."""
    for item in items:
        mark = item.get_closest_marker("slow_for")
        parameters = item.callspec.params if mark is not None else {}
        if mark is not None and parameters.get("method", parameters.get("case")) in mark.args:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    _unwrap(Options)
    gc.freeze()
    gc.enable()


# Compilation and loaded machines take their time; the same examples in every run.
settings.register_profile(
    "hvit_jax", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hvit_jax")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Let go of a module's compiled programs: those of all modules would take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def exact_matrix_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def goldens():
    return Goldens()


@pytest.fixture(scope="session")
def golden_checkpoint(goldens, tmp_path_factory):
    """The golden SWAG checkpoint, converted."""
    from hvit_jax.convert import convert_file

    directory = tmp_path_factory.mktemp("golden") / "checkpoint"
    convert_file(goldens.folder / "checkpoint.torch", directory, heads=goldens.size["num_heads"])
    return directory


@pytest.fixture(scope="session")
def converted_backbone(tmp_path_factory):
    """Convert a golden checkpoint of another library, once: the folder, and its description."""

    @functools.cache
    def convert(backbone):
        folder = tmp_path_factory.mktemp(backbone.folder.name) / "checkpoint"
        return folder, backbone.convert(folder)

    return convert


@pytest.fixture(scope="session")
def small_config():
    return SMALL


@pytest.fixture
def plain_cudnn(monkeypatch):
    """Run XLA's program where the fused kernel is called, and list these calls."""
    fused, seen = jax.nn.dot_product_attention, []

    def plain(*arrays, implementation, **options):
        seen.append(implementation)
        return fused(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    monkeypatch.setattr(cudnn, "obstacle", lambda dtype, size: None)
    return seen
