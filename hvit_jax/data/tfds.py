"""Datasets of TensorFlow Datasets, read without TensorFlow."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from PIL import Image

from hvit_jax.data.folder import SPLITS
from hvit_jax.data.picture import open_picture
from hvit_jax.errors import InputError, import_optional

PREFIX = "tfds:"
_NAME = re.compile(r"tfds:(?P<name>[^:\[\]]+(?::\d+\.\d+\.\d+)?)(?::(?P<split>.+))?")
_CHUNK = 512


@dataclass(frozen=True)
class TfdsPictures:
    """Pictures of one split, in the order of its records, named SPLIT/NUMBER."""

    records: Any  # The split's data source, which leaves pictures encoded.
    feature: str  # The name of the picture in a record.
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    exif: bool = False  # Whether pictures are turned as their EXIF data says.
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """Decode one picture to RGB."""
        encoded = io.BytesIO(self.records[index][self.feature])
        return open_picture(encoded, self.paths[index], exif=self.exif)


def read_tfds(name: str, splits: tuple[str, ...] = SPLITS, *, exif: bool = False) -> TfdsPictures:
    """Open one split of a dataset that has been prepared in the ArrayRecord format.

    Args:
        name: `tfds:NAME[:SPLIT]`; NAME may have a configuration and a version, as in
            `imagenet_v2/matched-frequency:3.0.0`, and SPLIT a part, as in `test[:1000]`. The folder
            is TensorFlow Datasets' own, or TFDS_DATA_DIR.
        splits: where `name` names no split, the first of these that is there is read.
        exif: turn pictures as their EXIF data says, when they are opened.

    Raises:
        InputError: if TensorFlow Datasets is not installed, the dataset is not prepared, or it has
            no such split, no pictures or no labels.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise InputError(f"{name}: expected tfds:NAME or tfds:NAME:SPLIT")
    tfds = _import_tfds()
    builder = _prepared(tfds, match["name"])
    known = builder.info.splits
    split = match["split"] or next((each for each in splits if each in known), None)
    if split is None:
        raise InputError(f"{name}: name one of its splits: {', '.join(known)}")
    picture, label = _features(tfds, name, builder.info)
    decoders = {picture: tfds.decode.SkipDecoding()}
    try:
        records = tfds.data_source(match["name"], split=split, decoders=decoders, download=False)
    except (ValueError, KeyError, NotImplementedError) as error:
        names = ", ".join(known)
        raise InputError(f"{name}: cannot open {split!r} (splits: {names}): {error}") from error
    labels = _labels(records, label)
    if not labels:
        raise InputError(f"{name}: split {split!r} is empty")
    if min(labels) < 0:
        raise InputError(f"{name}: split {split!r} has pictures without labels")
    paths = tuple(f"{split}/{index:08d}" for index in range(len(labels)))
    names = tuple(builder.info.features[label].names)
    return TfdsPictures(records, picture, paths, labels, names, exif)


def _import_tfds() -> Any:
    advice = "tfds: data needs TensorFlow Datasets and array_record: pip install 'hvit-jax[tfds]'"
    import_optional("array_record.python.array_record_data_source", advice)
    return import_optional("tensorflow_datasets", advice)


def _prepared(tfds: Any, name: str) -> Any:
    """Find a dataset on disk; nothing is downloaded, which may take hours and TensorFlow."""
    prepare = f"prepare it with: tfds build {name} --file_format=array_record"
    try:
        builder = tfds.builder(name, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(f"tfds has no dataset {name!r}, known or on disk") from error
    except (ImportError, ValueError, KeyError, AssertionError) as error:
        raise InputError(f"tfds cannot open {name!r}: {error}; {prepare}") from error
    if not builder.is_prepared():
        raise InputError(f"{name} is not prepared in {builder.data_dir}; {prepare}")
    return builder


def _features(tfds: Any, name: str, info: Any) -> tuple[str, str]:
    """Find the one picture and the one label of a record."""
    found = []
    for kind in (tfds.features.Image, tfds.features.ClassLabel):
        names = [key for key, feature in info.features.items() if isinstance(feature, kind)]
        preferred = [key for key in names if key in (info.supervised_keys or ())]
        if len(preferred or names) != 1:
            have = ", ".join(info.features)
            raise InputError(f"{name}: expected one {kind.__name__} in a record, it has: {have}")
        found.append((preferred or names)[0])
    return found[0], found[1]


def _labels(records: Any, label: str) -> tuple[int, ...]:
    labels: list[int] = []
    for start in range(0, len(records), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(records)))
        labels += [int(record[label]) for record in records.__getitems__(list(chunk))]
    return tuple(labels)
