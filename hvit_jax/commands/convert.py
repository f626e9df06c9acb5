"""The command `hvit convert`, also `python -m convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from hvit_jax.architectures import model_name
from hvit_jax.checkpoint import Description, origin_of
from hvit_jax.commands.flags import command
from hvit_jax.config import ViTConfig
from hvit_jax.convert import convert_file, export_file
from hvit_jax.convert.config import READING, ConvertConfig
from hvit_jax.convert.licences import licence_line
from hvit_jax.convert.switches import published_heads
from hvit_jax.convert.tasks import form_of
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.fields import show
from hvit_jax.models.parameters import abstract_parameters, count_parameters
from hvit_jax.system.run import one_line

PROGRAM = "hvit convert"
DESCRIPTION = "Convert weights of plain vision transformers, from PyTorch's files and back."
EPILOG = """\
examples:
  hf download facebook/dinov2-small --local-dir dinov2-small
  hvit convert dinov2-small dinov2-small.jax
  hvit convert dinov2_vits14_pretrain.pth dinov2.jax
  hvit convert vit_b16_in1k.torch vit_b16.jax
  hvit convert seg_large_mask_640 seg.jax
  hvit convert dinov2_vits14_pretrain.pth nyu.jax \
      --head dinov2_vits14_nyu_dpt_head.pth
  hvit convert --to-torch tuned.jax tuned.safetensors

It reads folders from the Hugging Face hub (config.json beside weights) and
bare files of torch.save or .safetensors (which need no PyTorch), in the
layouts of timm, transformers (ViT, DeiT, MAE, DINOv2, DINOv3, CLIP, SigLIP),
DINOv2, DINOv3, OpenAI's CLIP, OpenCLIP, SWAG and torchvision, told apart by
their keys; for segments and depth also Segmenter's folders (variant.yml beside
checkpoint.pth), its files for mmseg, and DINOv2's heads beside a backbone.
What a bare file does not say is assumed, and said. All numbers become float32.
Nothing inside a file is run. Nothing is written before every key has been used
once and converting back has given the same numbers.

hf download fetches a folder; hvit models lists where models are found.
SWAG's files: https://dl.fbaipublicfiles.com/SWAG/NAME.torch, where NAME is
vit_b16_in1k, vit_l16_in1k or vit_h14_in1k, or without _in1k (no head).
"""


def _convert(config: ConvertConfig) -> None:
    refuse_several(PROGRAM)
    jax.config.update("jax_platforms", "cpu")  # An accelerator's memory is left to others.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        if config.to_torch:
            description = export_file(
                config.source,
                config.destination,
                layout=config.layout,
                head=config.head,
                progress=progress,
            )
            form = form_of(description, config.layout)
            facts = {"source": str(config.source), "format": form.layout.name}
        else:
            description = convert_file(
                config.source,
                config.destination,
                **{name: getattr(config, name) for name in READING},
                head=config.head,
                progress=progress,
            )
            facts = {**_origin(description, config.source), **_heads_note(description.config)}
    print(_summary(description, config.destination, facts))


def _origin(description: Description, source: Path) -> dict[str, str]:
    """Tell what was read, what else the file holds, and what was assumed."""
    about: dict[str, Any] = {**description.source, "file": str(source)}
    for name in ("form", "licence", "input_size"):
        about.pop(name, None)
    if others := about.pop("other_entries", None):
        taken = about.get("entry", ".")
        about["entry"] = f"{taken} (also there: {', '.join(others)}; --entry NAME takes another)"
    if head := about.get("head"):
        about["head"] = head["file"]
    for name in ("ignored", "beside"):
        if passed := about.get(name):
            about[name] = ", ".join(passed)
    if assumed := about.get("assumed"):
        about["assumed"] = f"{assumed}; {_settled_by(assumed)}"
    return about | {"pictures": _pictures(description)}


def _settled_by(assumed: str) -> str:
    """Name the options that say what was assumed."""
    if assumed in ("preprocessing of swag", "preprocessing of torchvision"):
        return "--preprocessing swag or torchvision says which"
    options = {
        "heads": "--heads",
        "pixels": "--resolution",
        "activation": "--activation",
        "norm_eps": "--norm-eps",
        "preprocessing": "--preprocessing",
        "taps": "--taps",
        "depth range": "--depth-range",
    }
    named = [option for word, option in options.items() if word in assumed]
    return f"{', '.join(named)} say{'s' * (len(named) == 1)} otherwise"


def _pictures(description: Description) -> str:
    """Say how pictures are prepared for a model."""
    how, (height, width) = description.preprocessing, description.config.image_shape
    below, right = how.uncovered
    rows, columns = int((height + below) / how.crop_pct), int((width + right) / how.crop_pct)
    text = f"resized to {rows} x {columns}, {how.interpolation}; cut to {height} x {width}"
    if size := description.source.get("input_size"):
        text += f" (its own library cuts to {size[0]} x {size[1]}: --resolution of other commands)"
    return text


def _outputs(description: Description) -> dict[str, str]:
    """Say what comes out of a model."""
    sizes, decoder, windows = description.config, description.config.decoder, description.windows
    if decoder is None:
        return {"classes": f"{sizes.num_classes}" if sizes.num_classes else "none, no head"}
    blocks = ", ".join(map(str, decoder.taps))
    rows = {"decoder": decoder.kind + (f", which reads blocks {blocks}" if blocks else "")}
    if decoder.task == "depth":
        least, most = decoder.depth_range
        return {**rows, "depth": f"{least:g} to {most:g} m"}
    if windows.window:
        rows["windows"] = (
            f"of {show(windows.window)} pixels, every {show(windows.stride)}, of pictures whose "
            f"short side is {windows.short_side}"
        )
    return {**rows, "classes": f"{decoder.outputs}"}


def _heads_note(sizes: ViTConfig) -> dict[str, str]:
    usual = published_heads(depth=sizes.depth, width=sizes.width, mlp_width=sizes.mlp_width)
    if sizes.position_resizing != "swag" or usual in (None, sizes.heads):
        return {}
    return {"note": f"the published model of this size has {usual} heads, not {sizes.heads}"}


def _summary(description: Description, destination: Path, facts: dict[str, str]) -> str:
    """Describe in a few lines the model that was written, and more facts by their names."""
    sizes, source = description.config, origin_of(description)
    files = [destination, *destination.rglob("*")]
    megabytes = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    rows = {
        "model": f"{model_name(sizes)}: {sizes.depth} blocks, width {sizes.width}, "
        f"{sizes.heads} heads, MLP width {sizes.mlp_width}, patch size {sizes.patch_size}, "
        f"activation {sizes.activation}",
        "resolution": "{} x {} pixels, ".format(*sizes.image_shape)
        + "{} x {} patches".format(*sizes.grid),
        **_outputs(description),
        "parameters": f"{count_parameters(abstract_parameters(sizes)):,}",
        **facts,
        "checked": "every key used once, nothing missing; converting back gives the same numbers",
        "licence": licence_line(source.get("licence"), source.get("format", "SWAG")),
    }
    lines = [f"  {name:<10}  {one_line(value)}" for name, value in rows.items()]
    return "\n".join([f"wrote {destination} ({megabytes:,.1f} MB)", *lines])


main = command(PROGRAM, ConvertConfig, _convert, DESCRIPTION, EPILOG)
