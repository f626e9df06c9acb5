"""What a folder of Segmenter says of the model in it: `variant.yml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hvit_jax.config import as_pair
from hvit_jax.convert.facts import Facts
from hvit_jax.convert.families import FAMILIES
from hvit_jax.errors import InputError, first_line, unknown
from hvit_jax.pictures import Windows

VARIANT = "variant.yml"
DATA_SETS = {150: "ade20k", 60: "pascal_context", 19: "cityscapes"}  # By their classes.
# What pictures are scaled to, from one window to the next, and how often the short side the long
# one may be at most; None: as the window.
_USUAL = {
    "ade20k": (None, None, 4),
    "pascal_context": (520, 320, 8),
    "cityscapes": (1024, 512, 2),
}
_DECODERS = {"linear": "linear", "mask_transformer": "mask"}


class _Loader(yaml.SafeLoader):
    """Reads plain values alone, and the one other tag that Segmenter writes."""


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.construct_yaml_seq)


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a file of YAML whose tags could not run anything.

    Raises:
        InputError: if it cannot be read, or holds anything but plain values by their names.
    """
    try:
        content = yaml.load(file.read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "problem", None) or first_line(error)
        raise InputError(f"{file} is damaged, or holds more than plain values: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, no values by their names")
    return content


def read_segmenter(config: dict[str, Any], folder: Path) -> Facts:
    """Read what `variant.yml` says; see `configs.read_facts`."""
    net = config["net_kwargs"]
    kind = net.get("normalization")
    data_set = (config.get("dataset_kwargs") or {}).get("dataset")
    said = {"data_set": data_set, "normalization": kind}
    return Facts(
        "Segmenter",
        _switches(net),
        FAMILIES.get(f"Segmenter {kind}"),
        windows=_windows(config, data_set),
        notes={name: str(value) for name, value in said.items() if value is not None},
    )


def _switches(net: dict[str, Any]) -> dict[str, Any]:
    """Read what `net_kwargs` states of a model, by fields of `ViTConfig`."""
    decoder = net["decoder"]
    name = decoder["name"]
    kinds = [kind for word, kind in _DECODERS.items() if word in name]
    if not kinds:
        raise unknown("decoder", name, _DECODERS)
    about = {"kind": kinds[0], "outputs": net["n_cls"]}
    if "n_layers" in decoder and kinds[0] == "mask":
        about["depth"] = decoder["n_layers"]
    return {
        "heads": net["n_heads"],
        "width": net["d_model"],
        "depth": net["n_layers"],
        "patch_size": net["patch_size"],
        "resolution": as_pair(_pair(net["image_size"])),
        "distillation_token": bool(net.get("distilled", False)),
        "decoder": about,
    }


def usual_windows(
    data_set: str | None,
    window: int | tuple[int, int],
    short_side: int | None = None,
    stride: int | None = None,
) -> Windows:
    """Give the windows that a model of Segmenter is run with.

    Args:
        data_set: a name in `DATA_SETS`, which tells what is not given; None or another one: windows
            side by side, on pictures whose short side is a window's.
        window: the size of one.
        short_side: what pictures are scaled to.
        stride: from one window to the next.
    """
    short, step, times = _USUAL.get(str(data_set), (None, None, None))
    short_side = short_side or short or min(as_pair(window))
    long_side = times * short_side if times else None
    return Windows(short_side, long_side, window, stride or step or window)


def _windows(config: dict[str, Any], data_set: str | None) -> Windows:
    """Read how pictures are cut into windows."""
    said = config.get("inference_kwargs") or {}
    window = _pair(said.get("window_size") or config["net_kwargs"]["image_size"])
    return usual_windows(data_set, window, _pair(said.get("im_size")), said.get("window_stride"))


def _pair(value: Any) -> Any:
    """Read a size, one number or a list of two equal or different ones."""
    sides = as_pair(value) if value else None
    return sides[0] if sides and sides[0] == sides[1] else sides
