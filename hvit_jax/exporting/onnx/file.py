"""A model as an ONNX file, with what its user has to know inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hvit_jax.exporting.config import ExportConfig
from hvit_jax.exporting.forward import Weights, explain_unknown_batch, forward, pictures
from hvit_jax.exporting.onnx.graph import Graph, Shape, constant
from hvit_jax.exporting.onnx.translate import translate
from hvit_jax.models.vit import ViT
from hvit_jax.ops.platform import compiled_for
from hvit_jax.pictures import Preprocessing

# The first with GELU.
OPSET = 20
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
PIXELS, OUTPUT = "pixels", "output"
# Smaller constants stay in the file, and larger ones begin at pages, so that they can be mapped.
SMALL, PAGE = 1024, 4096


def write_onnx(
    folder: Path,
    model: ViT,
    weights: Weights,
    preprocessing: Preprocessing,
    config: ExportConfig,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write a model, and its weights beside it unless they are to be inside.

    Args:
        folder: takes the files.
        model: the model.
        weights: its weights, see `named_weights`.
        preprocessing: what the program normalises pictures with.
        config: for which batch, and where the weights go.
        about: what goes into the file as metadata: a JSON value for each key.

    Returns:
        What `export.json` says of the files.

    Raises:
        InputError: if the method needs to know the batch, or does what has no counterpart in ONNX.
    """
    graph, outputs = trace(model, weights, preprocessing, config.rows)
    inside = config.weights == "inside"
    with open(folder / WEIGHTS, "wb") as file:
        tensors = [
            numpy_helper.from_array(array, name)
            if inside or array.nbytes < SMALL
            else _put_outside(file, array, name)
            for name, array in graph.constants.items()
        ]
    if inside:
        (folder / WEIGHTS).unlink()
    pixels = helper.make_tensor_value_info(
        PIXELS, TensorProto.UINT8, _sizes(pictures(model, config.rows).shape)
    )
    output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, _sizes(outputs))
    proto = helper.make_model(
        helper.make_graph(graph.nodes, model.reducer.name, [pixels], [output], tensors),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=helper.find_min_ir_version_for([helper.make_opsetid("", OPSET)]),
        producer_name="hvit_jax",
    )
    helper.set_model_props(proto, {key: json.dumps(value) for key, value in about.items()})
    (folder / MODEL).write_bytes(proto.SerializeToString())
    return {
        "program": MODEL,
        "opset": OPSET,
        "weights": None if inside else {"file": WEIGHTS},
    }


def trace(
    model: ViT, weights: Weights, preprocessing: Preprocessing, batch: int | None
) -> tuple[Graph, Shape]:
    """Make the graph of a model, from `PIXELS` to `OUTPUT`, and tell the output's shape."""
    pixels = pictures(model, batch)
    with explain_unknown_batch(model, batch), compiled_for("onnx"):
        run = forward(model, preprocessing)
        program = jax.make_jaxpr(run)(list(weights.values()), pixels)
        graph = Graph(pixels.shape[0])
        arrays = [constant(array) for array in weights.values()]
        inputs = (*arrays, graph.input(PIXELS, pixels.shape, np.uint8))
        (result,) = translate(graph, program, inputs)
        shape = program.out_avals[0].shape
        graph.finish(graph.expand(result, shape), OUTPUT)
    return graph, shape


def _sizes(shape: Shape) -> list[int | str]:
    return [size if isinstance(size, int) else "batch" for size in shape]


def _put_outside(file, array: np.ndarray, name: str) -> onnx.TensorProto:
    """Append an array to the weights, and describe where it is."""
    start = -(-file.tell() // PAGE) * PAGE
    file.seek(start)
    file.write(array.data)
    tensor = TensorProto(
        name=name,
        dims=array.shape,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", WEIGHTS), ("offset", start), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
