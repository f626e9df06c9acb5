"""The rival: the same dense model in PyTorch, plain or as timm has it, with fused attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from hvit_jax.config import ViTConfig
from hvit_jax.convert.authors_layouts import SWAG
from hvit_jax.convert.keys import Form
from hvit_jax.convert.reader import import_torch
from hvit_jax.convert.tasks import to_state
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree
from hvit_jax.profiling.device import Work
from hvit_jax.profiling.rivals import Rival

_SIZES = ("resolution", "patch_size", "depth", "width", "heads", "mlp_width", "num_classes")
_MODES = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
# SWAG's names of weights, and ours of PyTorch's layers.
_RENAMED = {
    "encoder.layers.layer_": "blocks.",
    "self_attention.": "",
    "in_proj_": "in_proj.",
    "mlp.": "",
    "encoder.": "",
    "head.layers.": "",
}


def torch_rivals(
    model: Any, name: str, images: Float[Array, "B H W 3"], dtype: str
) -> Iterator[Rival]:
    """Make the ways to run PyTorch's dense model: precisions, each run eagerly and compiled.

    Args:
        model: the module, in float32 on the CPU.
        name: whose it is, for the report.
        images: the batch.
        dtype: what ours computes in.

    Raises:
        InputError: if PyTorch sees no GPU where JAX does.
    """
    torch, cuda = import_torch(), jax.default_backend() == "gpu"
    if cuda and not torch.cuda.is_available():
        raise InputError("JAX runs on a GPU, but PyTorch sees none; install PyTorch with CUDA")
    device = "cuda" if cuda else "cpu"
    pictures = torch.from_numpy(np.array(images, np.float32)).to(device)
    pictures, model = pictures.permute(0, 3, 1, 2).contiguous(), model.to(device)
    precisions = ("autocast", "bfloat16")
    if dtype == "float32":
        precisions = ("float32", "tf32") if cuda else ("float32",)
    # All models share their code, of which PyTorch compiles eight variants, then no more.
    torch.compiler.reset()
    for mode in _MODES if cuda else ("eager", "compiled"):
        for precision in precisions:
            way = copy.deepcopy(model).to(torch.bfloat16) if precision == "bfloat16" else model
            way = torch.compile(way, mode=_MODES[mode]) if _MODES[mode] else way
            works = (_work(way, precision, pictures[:count]) for count in (len(pictures), 1))
            yield Rival(f"{name} {precision}, {mode}", *works)


def _work(model: Any, precision: str, pictures: Any) -> Work:
    torch, device = import_torch(), pictures.device.type
    pictures = pictures.to(torch.bfloat16) if precision == "bfloat16" else pictures.contiguous()

    def start() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        mixed = torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")
        with torch.inference_mode(), mixed:
            return model(pictures)

    return Work(start, lambda result: torch.cuda.synchronize() if device == "cuda" else None)


def check_torch(config: ViTConfig) -> None:
    """Find out whether PyTorch is installed, and `build_torch_vit` builds such a model.

    Raises:
        InputError: if not.
    """
    import_torch()
    sizes = {name: getattr(config, name) for name in (*_SIZES, "position_resizing")}
    plain, ours = vars(ViTConfig(**sizes)), vars(config)
    if others := [name for name, value in ours.items() if value != plain[name]]:
        raise InputError(
            f"--against torch is SWAG's model, and this one has other {', '.join(others)}; "
            "--against timm builds it"
        )


def torch_model(config: ViTConfig, parameters: Tree) -> Any:
    """Build SWAG's vision transformer on given weights; see `build_torch_vit`."""
    state = as_tensors(jax.device_get(parameters), Form.usual(SWAG), config)
    return build_torch_vit(config, state)


def as_tensors(parameters: Tree, form: Form, config: ViTConfig) -> dict[str, Any]:
    """Name weights as a form has them, as PyTorch's tensors in float32."""
    torch = import_torch()
    arrays = to_state(parameters, form, config)
    return {key: torch.from_numpy(np.array(array, np.float32)) for key, array in arrays}


def build_torch_vit(config: ViTConfig, state: dict[str, Any] | None = None) -> Any:
    """Make SWAG's vision transformer from PyTorch's own layers.

    Args:
        config: its sizes.
        state: SWAG's state dict; without one the weights are random.
    """
    torch = import_torch()
    nn, width, side = torch.nn, config.width, config.patch_size

    class TorchBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
            self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.linear_1 = nn.Linear(width, config.mlp_width)
            self.linear_2 = nn.Linear(config.mlp_width, width)

        def forward(self, x):
            batch, tokens, _ = x.shape
            qkv = self.in_proj(self.ln_1(x)).reshape(batch, tokens, 3, config.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.out_proj(attended.transpose(1, 2).reshape(batch, tokens, width))
            return x + self.linear_2(nn.functional.gelu(self.linear_1(self.ln_2(x))))

    class TorchViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_proj = nn.Conv2d(3, width, side, side)
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embedding = nn.Parameter(torch.zeros(config.num_tokens, 1, width))
            self.blocks = nn.Sequential(*[TorchBlock() for _ in range(config.depth)])
            self.ln = nn.LayerNorm(width, 1e-6)
            classes = config.num_classes
            self.head = nn.Linear(width, classes) if classes else nn.Identity()

        def forward(self, images):
            x = self.conv_proj(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
            x = self.blocks(x + self.pos_embedding.transpose(0, 1))
            return self.head(self.ln(x[:, 0]))

    if state is None:
        return TorchViT().eval()
    with torch.device("meta"):
        model = TorchViT()
    renamed = {}
    for key, tensor in state.items():
        for theirs, ours in _RENAMED.items():
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    model.load_state_dict(renamed, assign=True)
    return model.eval()
