"""From the classes of the data to the outputs of the head."""

from __future__ import annotations

from collections.abc import Sequence

from hvit_jax.checkpoint import Description
from hvit_jax.errors import InputError


def head_labels(
    labels: Sequence[int], classes: Sequence[str], description: Description
) -> tuple[int, ...]:
    """Translate labels to the numbers of the head's outputs.

    Where data and checkpoint name the same classes, names decide; else the places in the order of
    both, as for ImageNet, whose folders and head are in the order of the WordNet numbers.

    Args:
        labels: indices into `classes`.
        classes: names of the data's classes.
        description: the checkpoint's.

    Raises:
        InputError: if the checkpoint has no head, or one for another number of classes.
    """
    outputs = description.config.num_classes
    if not outputs:
        raise InputError(
            "the checkpoint has no classification head; evaluate a fine-tuned one, such as SWAG's "
            "*_in1k files"
        )
    if len(classes) != outputs:
        raise InputError(
            f"the data has {len(classes)} classes, the checkpoint's head has {outputs}"
        )
    if set(classes) != set(description.classes):
        return tuple(labels)
    places = [description.classes.index(name) for name in classes]
    return tuple(places[label] for label in labels)
