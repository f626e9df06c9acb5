"""The test matrix: `nox` runs all, `nox -s "tests(highest)"` one. Needs nox and uv."""

import nox

nox.options.default_venv_backend = "uv"
PYTHONS = ["3.11", "3.12"]
# The machine code that users run; the tests' own is made faster. See tests/conftest.py.
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


@nox.session(python=PYTHONS)
@nox.parametrize("resolution", ["lowest-direct", "highest"])
def tests(session: nox.Session, resolution: str) -> None:
    """Run the tests with the oldest versions that pyproject.toml allows, and with the newest."""
    session.install("--resolution", resolution, "-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session(python="3.11")
def optimized(session: nox.Session) -> None:
    """Run the tests with programs that are compiled as users' are."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs, env=OPTIMIZED)


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """Report which lines the tests reach."""
    session.install("-e", ".[test]", "pytest-cov")
    session.run("python", "-m", "pytest", "-n", "2", "--cov=hvit_jax", "--cov-report=term")


@nox.session(python="3.11")
def slow(session: nox.Session) -> None:
    """Run what takes minutes: full-size models, and commands killed at random moments."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-m", "slow", env=OPTIMIZED)


@nox.session(python="3.12")
def kernels(session: nox.Session) -> None:
    """Interpret our kernels for GPUs on the CPU, which JAX does from 0.11 on."""
    session.install("-e", ".[test]", "jax>=0.11")
    env = {"PJRT_NPROC": "8"}
    session.run("python", "-m", "pytest", "tests/ops/test_hopper_kernels.py", env=env)


@nox.session(python="3.11")
def parity(session: nox.Session) -> None:
    """Compare small models of timm, transformers and OpenCLIP with what becomes of them here."""
    session.install("-e", ".[test,parity]")
    files = ("tests/convert/test_live_libraries.py", "tests/profiling/test_timm_vit.py")
    session.run("python", "-m", "pytest", *files)


@nox.session(python="3.11")
def release(session: nox.Session) -> None:
    """Build wheel and sdist into dist/, and try the wheel in an environment of its own."""
    session.install("build")
    session.run("python", ".ci/release.py", "dist")


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Check style, format, types and layers, and build the documentation."""
    session.install("-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("pyright")
    session.run("lint-imports")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())
