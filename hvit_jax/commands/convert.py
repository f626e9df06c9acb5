"""The command `hvit convert`, also `python -m convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from hvit_jax.architectures import model_name
from hvit_jax.checkpoint import Description
from hvit_jax.commands.flags import command
from hvit_jax.config import ViTConfig
from hvit_jax.convert import convert_file, export_file
from hvit_jax.convert.config import ConvertConfig
from hvit_jax.convert.detect import published_heads
from hvit_jax.convert.keys import PREPROCESSING, WRITTEN
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.models.parameters import abstract_parameters, count_parameters
from hvit_jax.system.run import one_line

PROGRAM = "hvit convert"
DESCRIPTION = "Convert PyTorch checkpoints of SWAG's and torchvision's vision transformers."
EPILOG = """\
examples:
  hvit convert vit_b16_in1k.torch vit_b16.jax
  hvit convert small.pth small.jax --heads 4
  hvit convert --to-torch tuned.jax tuned.torch
  hvit convert --to-torch tuned.jax tuned.safetensors --layout torchvision

It reads state dicts of SWAG and of torchvision's vit_b_16, vit_l_16 and
vit_h_14, with or without a head, told apart by their keys, in files of
torch.save or .safetensors (which need no PyTorch). Prefixes such as module.
and model. are dropped. All numbers become float32. Nothing inside a file is
run. Nothing is written before every key has been used once and converting
back has given the same numbers.

SWAG's files: https://dl.fbaipublicfiles.com/SWAG/NAME.torch, where NAME is
vit_b16_in1k, vit_l16_in1k or vit_h14_in1k, or without _in1k (no head).
Their weights are licensed CC-BY-NC 4.0.
"""


def _convert(config: ConvertConfig) -> None:
    refuse_several(PROGRAM)
    jax.config.update("jax_platforms", "cpu")  # An accelerator's memory is left to others.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        if config.to_torch:
            layout = config.layout or "swag"
            sizes = export_file(
                config.source, config.destination, layout=layout, progress=progress
            ).config
            facts = {"source": str(config.source), "format": WRITTEN[layout].name}
        else:
            description = convert_file(
                config.source,
                config.destination,
                heads=config.heads,
                grid=config.grid,
                entry=config.entry,
                preprocessing=config.preprocessing,
                progress=progress,
            )
            sizes = description.config
            facts = {**_origin(description, config.source), **_heads_note(sizes)}
    print(_summary(sizes, config.destination, facts))


def _origin(description: Description, source: Path) -> dict[str, str]:
    """Tell what was read, what else the file holds, and what was assumed."""
    about: dict[str, Any] = {**description.source, "file": str(source)}
    if others := about.pop("other_entries", None):
        taken = about.get("entry", ".")
        about["entry"] = f"{taken} (also there: {', '.join(others)}; --entry NAME takes another)"
    if ignored := about.get("ignored"):
        about["ignored"] = ", ".join(ignored)
    if assumed := about.get("assumed"):
        about["assumed"] = f"{assumed}; --preprocessing {' or '.join(PREPROCESSING)} says which"
    return about | {"pictures": _pictures(description)}


def _pictures(description: Description) -> str:
    """Say how pictures are prepared for a model."""
    how, (height, width) = description.preprocessing, description.config.image_shape
    rows, columns = int(height / how.crop_pct), int(width / how.crop_pct)
    return f"resized to {rows} x {columns}, {how.interpolation}; cut to {height} x {width}"


def _heads_note(sizes: ViTConfig) -> dict[str, str]:
    usual = published_heads(depth=sizes.depth, width=sizes.width, mlp_width=sizes.mlp_width)
    if usual in (None, sizes.heads):
        return {}
    return {"note": f"the published model of this size has {usual} heads, not {sizes.heads}"}


def _summary(sizes: ViTConfig, destination: Path, facts: dict[str, str]) -> str:
    """Describe in a few lines the model that was written, and more facts by their names."""
    files = [destination, *destination.rglob("*")]
    megabytes = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    rows = {
        "model": f"{model_name(sizes)}: {sizes.depth} blocks, width {sizes.width}, "
        f"{sizes.heads} heads, MLP width {sizes.mlp_width}, patch size {sizes.patch_size}",
        "resolution": "{} x {} pixels, ".format(*sizes.image_shape)
        + "{} x {} patches".format(*sizes.grid),
        "classes": f"{sizes.num_classes}" if sizes.num_classes else "none, no head",
        "parameters": f"{count_parameters(abstract_parameters(sizes)):,}",
        **facts,
        "checked": "every key used once, nothing missing; converting back gives the same numbers",
        "licence": "SWAG's weights, and what is tuned from them, are CC-BY-NC 4.0",
    }
    lines = [f"  {name:<10}  {one_line(value)}" for name, value in rows.items()]
    return "\n".join([f"wrote {destination} ({megabytes:,.1f} MB)", *lines])


main = command(PROGRAM, ConvertConfig, _convert, DESCRIPTION, EPILOG)
