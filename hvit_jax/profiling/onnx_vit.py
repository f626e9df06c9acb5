"""The rival of a CPU: the same dense model as an ONNX file in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, UInt8

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.errors import InputError, import_optional
from hvit_jax.models.parameters import Tree, build_model
from hvit_jax.models.reducer import Reducer
from hvit_jax.pictures import Preprocessing
from hvit_jax.profiling.device import Work
from hvit_jax.profiling.rivals import Rival


def check_onnx(config: ViTConfig) -> None:
    """Find out whether ONNX and ONNX Runtime are installed, and JAX runs on a CPU as they do.

    Raises:
        InputError: if not.
    """
    for module, name in (("onnx", "ONNX"), ("onnxruntime", "ONNX Runtime")):
        needs = f"--against onnxruntime needs {name}: pip install 'hvit-jax[onnx]'"
        import_optional(module, needs)
    if jax.default_backend() != "cpu":
        raise InputError(
            "--against onnxruntime compares on a CPU, and JAX runs on a "
            f"{jax.default_backend()}; use --against torch"
        )


def onnx_rivals(
    config: ViTConfig, parameters: Tree, pixels: UInt8[Array, "B H W 3"]
) -> Iterator[Rival]:
    """Make the one way to run the model in ONNX Runtime: in float32, on all cores.

    Args:
        config: the model's sizes.
        parameters: its weights.
        pixels: the batch, not normalised: the file does that.
    """
    import onnxruntime

    from hvit_jax.exporting.config import ExportConfig
    from hvit_jax.exporting.forward import named_weights
    from hvit_jax.exporting.onnx.file import MODEL, OUTPUT, PIXELS, write_onnx

    model = build_model(config, Reducer(), parameters, Compute(attention="xla", unroll=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = ExportConfig(output=folder, format="onnx")
        write_onnx(folder, model, named_weights(model), Preprocessing(), about, {})
        session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])

    def work(batch: np.ndarray) -> Work:
        def start() -> Any:
            return session.run([OUTPUT], {PIXELS: batch})[0]

        return Work(start, lambda result: None)

    batch = np.asarray(pixels)
    yield Rival("ONNX Runtime float32", work(batch), work(batch[:1]))
