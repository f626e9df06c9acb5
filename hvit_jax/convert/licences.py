"""Under which terms weights are published: what their files say, or what is usual."""

from __future__ import annotations

import re
from pathlib import Path

_TORCHVISION = "CC-BY-NC 4.0 for those that SWAG trained, BSD-3-Clause for torchvision's own"
# Of the weights that the authors of a layout published in it.
_USUAL = {
    "SWAG": "CC-BY-NC 4.0",
    "torchvision": _TORCHVISION,
    "torchvision (older)": _TORCHVISION,
    "DINOv2": "Apache-2.0",
    "DINOv3": "the DINOv3 License, with terms for use, passing on and attribution",
    "OpenCLIP timm": "named on their model cards",
    "OpenCLIP": "MIT for OpenAI's and most of LAION's, CC-BY-NC 4.0 for MetaCLIP's, Apple's own "
    "for DFN's",
    "transformers vit": "Apache-2.0; CC-BY-NC 4.0 for MAE's",
    "transformers dinov2": "Apache-2.0",
    "transformers dinov3_vit": "the DINOv3 License, with terms for use, passing on and attribution",
    "transformers clip": "MIT for OpenAI's, CC-BY-NC 4.0 for MetaCLIP's",
    "transformers siglip": "Apache-2.0",
    "Segmenter": "MIT",
    "Segmenter mmseg": "MIT",
    "timm": "named on their model cards",
}


def licence_line(stated: str | None, layout: str) -> str:
    """Say in one line what licence weights have.

    Args:
        stated: what the files beside them say; None: nothing.
        layout: the name of the weights' layout, such as "timm" or "transformers dinov2".
    """
    if stated:
        return f"{stated}, also for what is tuned from these weights"
    return f"not stated beside the weights; published ones in this layout: {_USUAL[layout]}"


def card_licence(folder: Path) -> str | None:
    """Read the licence in the head of a folder's model card, `README.md`; None: not said."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text("utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    line = re.compile(r"^(license|license_name): *[\"']?([\w.-]+)", re.MULTILINE)
    names = dict(line.findall(head[1])) if head else {}
    return names.get("license_name", names.get("license"))
