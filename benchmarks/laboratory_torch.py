"""PyTorch's fastest dense models, for `laboratory.py`: prints JSON, a line for every way to run.

bfloat16 throughout, `scaled_dot_product_attention`, blocks compiled one by one since they share
their code; single images in a CUDA graph.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hvit_jax.architectures import MODELS
from hvit_jax.config import ViTConfig
from hvit_jax.profiling.torch_vit import build_torch_vit

BATCH = 32
SIZES = {name: MODELS[name] for name in ("vit_l16", "vit_h14")}
SMALL = {"tiny": ViTConfig(64, patch_size=8, depth=2, width=32, heads=2, mlp_width=64)}
MODES = (None, "default", "max-autotune-no-cudagraphs")


def milliseconds(run: Callable[[], Any], device: str, seconds: float = 0.25) -> float:
    """Time calls that are enqueued together: the median of five rounds."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(4):
        run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    calls = max(2, int(seconds / (time.perf_counter() - start)))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        rounds.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def captured(model: nn.Module, image: torch.Tensor) -> Callable[[], None]:
    """Record a forward pass as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(image)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(image)
    return graph.replay


def measure(name: str, model: nn.Module, mode: str | None, images: torch.Tensor) -> None:
    """Time a model of one way to run it, the batch and one image."""
    if mode is not None:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(mode=mode)
    row = {"row": f"PyTorch {name} {mode or 'eager'}", "torch": torch.__version__}
    try:
        ms = milliseconds(lambda: model(images), images.device.type)
        row |= {"ms": ms, "images_per_second": 1e3 * len(images) / ms}
        if images.is_cuda:
            run = captured(model, images[:1].contiguous())
            row["one_image_ms"] = milliseconds(run, "cuda")
    except Exception as error:  # Compiling fails in many ways; the others go on.
        row["error"] = repr(error)[:1000]
    print(json.dumps(row), flush=True)


@torch.inference_mode()
def main(seconds: float, small: bool) -> None:
    """Measure until the time is up."""
    end = time.monotonic() + seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    sizes = SMALL if small else SIZES
    models = {
        name: build_torch_vit(each).to(device, torch.bfloat16) for name, each in sizes.items()
    }
    for mode in MODES[:1] if small else MODES:
        for name, model in models.items():
            if time.monotonic() < end:
                shape = (2 if small else BATCH, 3, *sizes[name].image_shape)
                images = torch.randn(shape, device=device, dtype=torch.bfloat16)
                measure(name, copy.deepcopy(model), mode, images)


if __name__ == "__main__":
    main(float(sys.argv[1]), small="small" in sys.argv[2:])
