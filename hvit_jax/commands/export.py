"""`hvit export`: write a model as a program that runs without this package."""

from __future__ import annotations

from hvit_jax.commands.flags import command
from hvit_jax.exporting import ExportConfig, export
from hvit_jax.exporting.run import LOADER
from hvit_jax.reducers import method_name

PROGRAM = "hvit export"
DESCRIPTION = """Write a checkpoint under a method as jax.export programs or as an ONNX file, with
weights, the values that pictures are prepared with, and a loader that needs neither this package
nor Flax. Without --checkpoint it exports the bundled demo."""


def _export(config: ExportConfig) -> None:
    about = export(config)
    method = method_name(about["method"], about["args"])
    size = "x".join(map(str, about["input"]["resolution"]))
    batch = "any batch" if config.rows is None else f"batches of {config.rows}"
    target = (
        f"ONNX opset {about['opset']}"
        if config.format == "onnx"
        else " and ".join(about["programs"])
    )
    print(f"exported: {method} at {size}, {about['dtype']}, for {target}; {batch}")
    print(f"run it: python {config.output / LOADER} PICTURE ...")


main = command(PROGRAM, ExportConfig, _export, DESCRIPTION)
