"""Which of the head's outputs are right for a picture: by names, by order, or from a file."""

from __future__ import annotations

import csv
import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int

from hvit_jax.data.folder import EXTENSIONS, first_number
from hvit_jax.data.source import Source, Subset
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, option
from hvit_jax.system.files import read_json

Right = tuple[int, ...]  # The outputs that are right for one picture or class.
_ORDER, _NUMBERS = "order", "numbers"
_NAMED = 3  # classes of each side, in a message
# ReaL's labels come as a list, in the order of these files (Beyer et al. 2020, arXiv 2006.07159).
_IMAGENET = "ILSVRC2012_val_{:08d}"


_labels = functools.partial(option, group="labels")


@dataclass(frozen=True)
class Labelling(Options):
    """How pictures get their labels; see docs/data.md.

    Raises:
        InputError: if more than one way is named.
    """

    labels: Path | None = _labels(
        None,
        "right classes of pictures, instead of class folders: lines NAME,LABEL or NAME LABEL, or "
        "JSON, where a picture may have several or none",
        metavar="FILE",
    )
    class_map: Path | None = _labels(
        None,
        "which of the head's outputs each class folder is: JSON, or lines FOLDER,LABEL",
        metavar="FILE",
    )
    order: bool = _labels(
        False, "class folders in their order are the head's outputs in theirs, whatever their names"
    )
    subset: bool = _labels(
        False, "only outputs of classes that the data has compete, as usual for ImageNet-A and -R"
    )

    def __post_init__(self):
        super().__post_init__()
        ways = {"--labels": self.labels, "--class-map": self.class_map, "--order": self.order}
        given = [flag for flag, value in ways.items() if value]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} contradict each other; give one of them")


@dataclass(frozen=True)
class Classes:
    """What pictures are told apart by: the outputs of a head, or of what stands in its place.

    Attributes:
        count: how many outputs there are.
        names: of their classes, where they are known.
        owner: whose names they are, for messages.
        holder: what has them, for messages.
    """

    count: int
    names: tuple[str, ...] = ()
    owner: str = "the checkpoint"
    holder: str = "the checkpoint's head"


@dataclass(frozen=True)
class Labelled:
    """Pictures whose labels are numbers of the head's outputs.

    Attributes:
        source: the pictures that have a label.
        right: the right output of every picture; where some have several, a row of them each,
            filled up with -1.
        outputs: those that compete, ascending; None for all.
        names: of every output; its number where nothing names it.
        by: how the labels were made.
        notes: what a user should know of that.
    """

    source: Source
    right: Int[np.ndarray, "N ..."]
    outputs: tuple[int, ...] | None
    names: tuple[str, ...]
    by: str
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Say how labels were made, as results do, and name them and the outputs by content."""
        numbers = (self.right, np.array(self.outputs or (), np.int32))
        content = b"".join(array.astype("<i4").tobytes() for array in numbers)
        about = {
            "by": self.by,
            "outputs": len(self.outputs or self.names),
            "notes": list(self.notes),
        }
        return {"labels": about, "labels_sha256": hashlib.sha256(content).hexdigest()}


def label_pictures(
    source: Source, outputs: Classes, labelling: Labelling = Labelling()
) -> Labelled:
    """Find the right outputs of pictures.

    Args:
        source: the pictures; with `labelling.labels` its own labels do not count.
        outputs: those that may be right.
        labelling: how; by default names decide, where the outputs have names.

    Raises:
        InputError: if labels cannot be read, or do not fit the outputs.
    """
    if labelling.labels is not None:
        right, notes = _of_pictures(source.paths, outputs, labelling.labels)
        there, by = set().union(*right), f"the file {labelling.labels.name}"
    else:
        of_class, by, notes = _of_classes(source.classes, outputs, labelling)
        right, there = [of_class[label] for label in source.labels], set().union(*of_class)
    kept = [place for place, each in enumerate(right) if each]
    if not kept:
        raise InputError(f"{by} has no right label for any picture")
    if without := len(right) - len(kept):
        notes.insert(0, f"left out: pictures without a right label ({without})")
        source, right = Subset(source, tuple(kept)), [right[place] for place in kept]
    competing = None
    if len(there) < outputs.count:
        if labelling.subset:
            competing = tuple(sorted(there))
            notes.append(
                f"only outputs of the data's {len(there)} classes compete, of {outputs.count}"
            )
        else:
            notes.append(
                f"the data has {len(there)} classes, {outputs.holder} {outputs.count}; all outputs "
                "compete (with --subset only the data's)"
            )
    in_order = by in (_ORDER, _NUMBERS)
    names = outputs.names or (source.classes if in_order else map(str, range(outputs.count)))
    return Labelled(source, _as_array(right), competing, tuple(names), by, tuple(notes))


def _as_array(right: Sequence[Right]) -> Int[np.ndarray, "N ..."]:
    rows = np.full((len(right), max(map(len, right))), -1, np.int32)
    for row, each in zip(rows, right, strict=True):
        row[: len(each)] = each
    return rows[:, 0] if rows.shape[1] == 1 else rows


def _of_classes(
    classes: Sequence[str], outputs: Classes, labelling: Labelling
) -> tuple[list[Right], str, list[str]]:
    """Find the right outputs of every class, say how, and what a user should know."""
    known = outputs.names
    if labelling.class_map is not None:
        table = _Labels(labelling.class_map, outputs)
        if missing := [name for name in classes if name not in table.found]:
            raise InputError(f"{table.path} does not have {_some(missing)}; it has {table}")
        return [table.right(name) for name in classes], f"the file {table.path.name}", []
    if known and set(classes) <= set(known) and not labelling.order:
        places = {name: place for place, name in enumerate(known)}
        return [(places[name],) for name in classes], "names", []
    differing = difference(classes, known, outputs.owner)
    if len(classes) != outputs.count:
        raise InputError(
            f"the data has {len(classes)} classes, {outputs.holder} has {outputs.count}"
            f"{differing}; --class-map FILE says which output each folder is"
        )
    in_order: list[Right] = [(place,) for place in range(outputs.count)]
    start = None if labelling.order else first_number(classes)
    if known and start != 0 and not labelling.order:
        raise InputError(
            f"the data's class names are not {outputs.owner}'s{differing}; "
            "--class-map FILE says which output each folder is, --order takes both in their order"
        )
    if start is None:
        return in_order, _ORDER, _order_of_names(classes)
    first, last = classes[0], classes[-1]
    notes = [f"class folders {first} to {last} are taken as the outputs' numbers"] if known else []
    if start == 1:
        notes = [
            f"class folders {first} to {last} go by number: {first} is the head's first output "
            "(another order: --class-map FILE)"
        ]
    return in_order, _NUMBERS, notes


def _order_of_names(classes: Sequence[str]) -> list[str]:
    """Say where names are not in the order of numbers in them, such as class_10 before class_2."""
    last: dict[str, tuple[list[int], str]] = {}
    for name in classes if list(classes) == sorted(classes) else ():
        kind, numbers = re.sub(r"\d+", "0", name), [*map(int, re.findall(r"\d+", name))]
        larger, before = last.get(kind, ([], ""))
        if larger > numbers:
            return [
                f"class folders go by name: {before} comes before {name} (another order: "
                "--class-map FILE)"
            ]
        last[kind] = numbers, name
    return []


def difference(classes: Sequence[str], known: Sequence[str], owner: str = "the checkpoint") -> str:
    """Say which names one side alone has, where both have names."""
    sides = {"the data": set(classes) - set(known), owner: set(known) - set(classes)}
    parts = [f"only {side} has {_some(sorted(names))}" for side, names in sides.items() if names]
    return f" ({', '.join(parts)})" if known else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _of_pictures(
    pictures: Sequence[str], outputs: Classes, path: Path
) -> tuple[list[Right], list[str]]:
    """Find the right outputs of every picture in a file, and what a user should know.

    Pictures are found by their path or the end of it, with or without their extension.
    """
    table = _Labels(path, outputs)
    named: dict[str, str] = {}
    right, missing = [], []
    for picture in pictures:
        name = next((name for name in _names(picture) if name in table.found), None)
        if name is None:
            missing.append(picture)
            continue
        if name in named:
            raise InputError(
                f"{path}: {name} is both {named[name]} and {picture}; write their folders too"
            )
        named[name] = picture
        right.append(table.right(name))
    if missing:
        raise InputError(
            f"{path} has no label for {len(missing)} of {len(pictures)} pictures: {_some(missing)};"
            f" it has {table}"
        )
    surplus = len(table.found) - len(named)
    return right, [f"{path.name} names {surplus} pictures that are not here"] if surplus else []


def _names(picture: str) -> Iterable[str]:
    """List the names by which a file may call a picture, the longest first."""
    parts = _plain(picture).split("/")
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    return [*ends, *(end.rpartition(".")[0] for end in ends)]


def _plain(name: str) -> str:
    """Write a path in one way: no ./ before it, no slash behind it, letters and accents as one."""
    return unicodedata.normalize("NFC", PurePosixPath(name).as_posix())


class _Labels:
    """Labels of a file, as it has them, by name."""

    def __init__(self, path: Path, outputs: Classes):
        """Read the file: JSON, or lines.

        Raises:
            InputError: if it cannot be read so.
        """
        self.path = path
        self._outputs = outputs
        self._places = {name: place for place, name in enumerate(outputs.names)}
        # Where all names are numbers, such as 1 to 12, numbers are names: 1 is the first output.
        numbers = all(name.isascii() and name.isdecimal() for name in self._places)
        self._numbered = {int(name): self._places[name] for name in self._places if numbers}
        read = self._read_json() if path.suffix.lower() == ".json" else self._read_lines()
        self.found = {_plain(name): labels for name, labels in read.items()}

    def __str__(self) -> str:
        return _some(list(self.found)) or "no names"

    def right(self, name: str) -> Right:
        """Give the right outputs of a name that is there."""
        return tuple(dict.fromkeys(self._checked(label, name) for label in self.found[name]))

    def _checked(self, label: Any, name: str) -> int:
        """Turn a label, a number or the name of a class, into the number of an output."""
        number = self._number(label)
        if number is None:
            no_number = "" if self._numbered else "no number and "
            raise InputError(
                f"{self.path}: the label {label!r} of {name} is {no_number}no class of "
                f"{self._outputs.owner}"
            )
        if not 0 <= number < self._outputs.count:
            raise InputError(
                f"{self.path}: the label {number} of {name}: outputs are 0 to "
                f"{self._outputs.count - 1}"
            )
        return number

    def _number(self, label: Any) -> int | None:
        if isinstance(label, str):
            if label in self._places:
                return self._places[label]
            label = int(label) if label.isascii() and label.isdecimal() else None
        if not isinstance(label, int) or isinstance(label, bool):
            return None
        return self._numbered.get(label) if self._numbered else label

    def _read_json(self) -> dict[str, list[Any]]:
        """Read `{NAME: LABEL or [LABEL, ...]}`, or ReaL's list."""
        content = read_json(self.path, lists=True)
        if isinstance(content, list):
            content = {_IMAGENET.format(place): each for place, each in enumerate(content, 1)}
        return {name: each if isinstance(each, list) else [each] for name, each in content.items()}

    def _read_lines(self) -> dict[str, list[str]]:
        """Read `NAME,LABEL` or `NAME LABEL` a line; a line of titles above them is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is no text file") from error
        found: dict[str, list[str]] = {}
        for place, line in enumerate(filter(str.strip, lines)):
            row = next(csv.reader([line])) if "," in line else line.rsplit(None, 1)
            name, *labels = map(str.strip, row)
            titles = not place and not name.lower().endswith(EXTENSIONS)
            if titles and not any(each.isdecimal() or each in self._places for each in labels):
                continue
            if not labels:
                raise InputError(f"{self.path}: expected NAME,LABEL in each line, got {line!r}")
            if found.setdefault(name, labels) != labels:
                raise InputError(f"{self.path} has two labels for {name}")
        return found
