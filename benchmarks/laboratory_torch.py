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

BATCH = 32
# Resolution, patch size, depth, width, heads and channels of the MLP.
SIZES = {"vit_l16": (512, 16, 24, 1024, 16, 4096), "vit_h14": (518, 14, 32, 1280, 16, 5120)}
SMALL = {"tiny": (64, 8, 2, 32, 2, 64)}
MODES = (None, "default", "max-autotune-no-cudagraphs")


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int, mlp_width: int):
        """Make a block of random weights."""
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.linear_1, self.linear_2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        batch, tokens, width = x.shape
        qkv = self.in_proj(self.ln_1(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out_proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.linear_2(nn.functional.gelu(self.linear_1(self.ln_2(x))))


class ViT(nn.Module):
    """A dense vision transformer of 1,000 classes."""

    def __init__(self, side: int, patch: int, depth: int, width: int, heads: int, mlp_width: int):
        """Make a model of random weights."""
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList([Block(width, heads, mlp_width) for _ in range(depth)])
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Classify."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x[:, 0]))


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
    models = {name: ViT(*size).to(device, torch.bfloat16).eval() for name, size in sizes.items()}
    for name, model in models.items():
        for mode in MODES[:1] if small else MODES:
            if time.monotonic() < end:
                side = sizes[name][0]
                shape = (2 if small else BATCH, 3, side, side)
                images = torch.randn(shape, device=device, dtype=torch.bfloat16)
                measure(name, copy.deepcopy(model), mode, images)


if __name__ == "__main__":
    main(float(sys.argv[1]), small="small" in sys.argv[2:])
