"""What the files beside a model's weights say, in one form for all libraries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hvit_jax.pictures import Preprocessing, Windows


@dataclass(frozen=True)
class Facts:
    """What the files beside the weights say.

    Attributes:
        layout: whose keys the weights have: "timm", "OpenCLIP", "Segmenter", or "transformers"
            and its model type, such as "transformers dinov2".
        switches: fields of `ViTConfig` that are stated, those of its decoder in a dict. What shapes
            tell is there only where it is written down, to be compared; `resolution` may leave a
            rest that no whole patch covers.
        preprocessing: how pictures are prepared; None: not said.
        input_size: height and width that this ends in, where they are not the model's own.
        classes: names of the head's outputs, in order; empty: not said.
        licence: of the weights; None: not said.
        windows: how pictures are cut for models that make maps; None: not said.
        file: the name of the file that says so.
        notes: what to tell the user, by a word for each.
    """

    layout: str
    switches: dict[str, Any]
    preprocessing: Preprocessing | None = None
    input_size: tuple[int, int] | None = None
    classes: tuple[str, ...] = ()
    licence: str | None = None
    windows: Windows | None = None
    file: str = "config.json"
    notes: dict[str, str] = field(default_factory=dict)


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Tell classes of one name apart by their numbers: ImageNet has two called "crane"."""
    names = [str(name) for name in names]
    count = Counter(names)
    return tuple(
        name if count[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)
    )


# Why models of other kinds cannot be read, and how their names begin.
_OTHERS = {
    "its attention is within windows": ("swin", "hiera", "sam", "vitdet"),
    "its positions are biases of the attention": ("beit", "data2vec"),
    "it is a convolutional network": ("convnext", "resnet", "efficientnet", "regnet"),
    "it has stages of several resolutions": (
        *("levit", "pvt", "mvit", "maxvit", "mobilevit", "segformer"),
    ),
    "its last blocks attend from CLS alone": ("cait",),
    "its attention is between channels": ("xcit",),
    "its pictures have sizes of their own": ("naflexvit",),
}


def not_plain(name: str) -> str | None:
    """Say why models of a name are not plain vision transformers; None: not known."""
    return next((reason for reason, kinds in _OTHERS.items() if name.startswith(kinds)), None)
