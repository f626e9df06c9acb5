"""What `hvit export` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.config import WITHOUT_FLOAT8, Compute
from hvit_jax.demo.config import OnCheckpoint
from hvit_jax.errors import InputError
from hvit_jax.fields import nested, option
from hvit_jax.reducers import Reducer, method_of_checkpoint

# JAX's names of platforms, and what `jax.default_backend` calls them.
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
FORMATS = ("jax", "onnx")
DEFAULT_PLATFORMS = ("cpu", "cuda")
SYMBOLIC = "symbolic"


@dataclass(frozen=True)
class ExportConfig(OnCheckpoint):
    """What to export, for what, and where to.

    Of jax.export's programs each platform gets its own, since what is fast on one is slow on
    another. An ONNX file runs wherever its runtime does.
    """

    output: Path = option(help="folder to write, which must not exist", short="-o", metavar="DIR")
    format: str = option(
        "jax", "jax: programs of jax.export; onnx: a file for other runtimes", choices=FORMATS
    )
    reducer: Reducer | None = method_of_checkpoint()
    compute: Compute = nested(
        Compute,
        leave=("param_dtype", "attention", "gelu", "unroll", "remat"),
        choices=WITHOUT_FLOAT8,
    )
    platforms: tuple[str, ...] = option(
        DEFAULT_PLATFORMS,
        f"for jax.export: {', '.join(PLATFORMS)}; this machine need not have them",
        choices=tuple(PLATFORMS),
        metavar="NAME[,NAME...]",
    )
    batch: int | str = option(
        SYMBOLIC, f"pictures at once, or {SYMBOLIC} for any number", metavar=f"{SYMBOLIC}|N"
    )
    weights: str = option(
        "beside",
        "where weights are stored: once in a file beside the programs, or inside each of them",
        choices=("beside", "inside"),
    )

    def __post_init__(self):
        super().__post_init__()
        # JAX gives no guarantee for programs that call cuDNN, and makes them on NVIDIA GPUs only.
        if self.compute.attention not in ("auto", "xla"):
            raise InputError(
                f"programs compute attention by plain XLA, not by {self.compute.attention}"
            )
        if self.format == "onnx":
            self._check_onnx()
        if not self.platforms:
            raise InputError("--platforms needs at least one name")
        if self.batch != SYMBOLIC and not (isinstance(self.batch, int) and self.batch > 0):
            raise InputError(
                f"--batch must be {SYMBOLIC} or a number of at least 1, got '{self.batch}'"
            )

    def _check_onnx(self):
        if self.compute.dtype != "float32":
            raise InputError(
                f"--format onnx computes in float32, not in {self.compute.dtype}; a runtime that "
                "can rounds by itself, such as OpenVINO by its INFERENCE_PRECISION_HINT"
            )
        if self.platforms != DEFAULT_PLATFORMS:
            raise InputError("--platforms is for --format jax; an ONNX file has one program")

    @property
    def rows(self) -> int | None:
        """Pictures at once; None for any number."""
        return self.batch if isinstance(self.batch, int) else None
