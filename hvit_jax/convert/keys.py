"""What a layout of PyTorch checkpoints is: rows of keys, and which of them one file has."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from hvit_jax.config import ViTConfig
from hvit_jax.models.parameters import abstract_parameters, flatten

Shape = tuple[int, ...]
# Where the periods of rotary positions are noted, which are part of the configuration, no weights.
PERIODS = "rope/periods"
STACKS = ("blocks", "decoder/blocks")


def depths_of(config: ViTConfig) -> dict[str, int]:
    """Count the blocks of each of `STACKS`."""
    own = 0 if config.decoder is None else config.decoder.depth
    return {"blocks": config.depth, "decoder/blocks": own}


@dataclass(frozen=True)
class Transform:
    """How PyTorch's array becomes ours, as in `hvit_jax.models.parameters`, and back."""

    to_ours: Callable[[Float32[np.ndarray, "*shape"]], Float32[np.ndarray, "*shape"]]
    to_torch: Callable[[Float32[np.ndarray, "*shape"]], Float32[np.ndarray, "*shape"]]


def _patch_kernel(weight: Float32[np.ndarray, "C 3 p p"]) -> Float32[np.ndarray, "*shape"]:
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _patch_convolution(kernel: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "C 3 p p"]:
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Transform(lambda array: array, lambda array: array)
TRANSPOSED = Transform(lambda array: array.T, lambda array: array.T)
TOKEN = Transform(lambda array: array[0, 0], lambda array: array[None, None])
SEQUENCE_FIRST = Transform(lambda array: array[:, 0], lambda array: array[:, None])
BATCH_FIRST = Transform(lambda array: array[0], lambda array: array[None])
PATCHES = Transform(_patch_kernel, _patch_convolution)
# Convolutions: of single places, of squares, and those that enlarge each place to a square.
OF_PLACES = Transform(lambda array: array[:, :, 0, 0].T, lambda array: array.T[:, :, None, None])
OF_SQUARES = Transform(
    lambda array: array.transpose(2, 3, 1, 0), lambda array: array.transpose(3, 2, 0, 1)
)
TO_SQUARES = Transform(
    lambda array: array.transpose(0, 2, 3, 1), lambda array: array.transpose(0, 3, 1, 2)
)


@dataclass(frozen=True)
class Entry:
    """One row of a layout's table.

    Attributes:
        key: in the state dict; `{i}` is the number of the block, other names are the layout's.
        path: in our tree; those of all blocks are stacked below `blocks/`, and a decoder's below
            `decoder/blocks/`.
        shape: of PyTorch's array. Letters: C width, S positions, R registers, p patch side, M MLP
            width, H what the MLP's first layer gives (2M where it holds gates too), D head size,
            F the pooled feature's width, K classes, V outputs of the projection, N hidden channels
            of the pooling's MLP, T periods; 3C is three times C. Of decoders: O outputs, J channels
            of all taps, W of each, U of the maps that are fused, h half of these, and a, b, c, d of
            the maps that are made of each tap.
        transform: how the two differ.
        part: where the array is a part of ours: from where to where along the last axis, and of how
            many equal parts.
        variant: rows of one path that do not stand beside each other in a file differ in this; ""
            is the usual.
        when: a switch of the model, or of its decoder as in `decoder.kind`, and its value, if only
            such models have the row.
        mask: whether these are zeros and ones that the array of the row before is multiplied with.
    """

    key: str
    path: str
    shape: str
    transform: Transform = SAME
    part: tuple[int, int, int] | None = None
    variant: str = ""
    when: tuple[str, Any] | None = None
    mask: bool = False

    @property
    def stack(self) -> str:
        """Name the blocks of which each has one of these, "blocks" or "decoder/blocks"; or ""."""
        return next((each for each in STACKS if self.path.startswith(f"{each}/")), "")

    def place(self, array: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*part"]:
        """Give the view of one of our arrays that this row fills."""
        if self.part is None:
            return array
        start, stop, count = self.part
        size = array.shape[-1] // count
        return array[..., start * size : stop * size]

    @property
    def key_bias(self) -> bool:
        """Whether the row holds the bias of keys and nothing else."""
        return self.path == "blocks/in_proj/bias" and self.part == (1, 2, 3)


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint.

    Attributes:
        name: what messages and `model.json` call it.
        entries: a row for every parameter that a model of this kind can have.
        names: what may stand for each name in keys; first the usual.
        anchors: paths whose keys tell where in a file a model of this kind is.
        switches: fields of `ViTConfig` that all these models share.
        usual: others, where nothing is stated.
        classifying: others that those share that have a head.
        resizing: the rule for their positions, without and with registers.
        mark: a key and its number of axes that decide between two layouts of the same keys.
        ignored: patterns of keys that are passed over.
        beside: of keys outside of a `{root}` that is not empty, that are passed over too.
        refused: patterns of keys, and what they mean, of models that are not read.
        family: of `hvit_jax.convert.families`, where all models of this kind are of one.
    """

    name: str
    entries: tuple[Entry, ...]
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    anchors: tuple[str, ...] = ("class_token", "patch_embed/kernel", "pos_embedding")
    switches: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)
    classifying: dict[str, Any] = field(default_factory=dict)
    resizing: tuple[str, str] = ("bicubic_antialias", "bicubic_antialias")
    mark: tuple[str, int] | None = None
    ignored: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    family: str = ""


def norm(key: str, path: str, size: str = "C") -> tuple[Entry, Entry]:
    """List the rows of a LayerNorm; `key` ends where `weight` and `bias` begin."""
    return (
        Entry(f"{key}weight", f"{path}/scale", size),
        Entry(f"{key}bias", f"{path}/bias", size),
    )


def linear(key: str, path: str, shape: str, **more: Any) -> tuple[Entry, Entry]:
    """List the rows of a linear layer; `shape` is its weight's, outputs first."""
    return (
        Entry(f"{key}weight", f"{path}/kernel", shape, TRANSPOSED, **more),
        Entry(f"{key}bias", f"{path}/bias", shape.split()[0], **more),
    )


def apart(*keys: str, path: str = "blocks/in_proj", shape: str, **more: Any) -> tuple[Entry, ...]:
    """List the rows of several linear layers that are one of ours, side by side."""
    count = len(keys)
    parts = [(number, number + 1, count) for number in range(count)]
    rows = [
        linear(key, path, shape, part=part, **more) for key, part in zip(keys, parts, strict=True)
    ]
    return sum(rows, ())


# Keys that no model of ours needs, whatever the layout: targets of masked training, projections of
# self-supervised training, counters, and tables that follow from sizes.
NEVER_NEEDED = (
    *(r"(.*\.)?mask_token", r"decoder\..*", r"decoder_.*", r"dino_head\..*", r"ibot_head\..*"),
    *(r"head\.mlp\..*", r"head\.last_layer\..*", r"projectors\..*", r"pre_logits\..*"),
    *(r"(.*\.)?num_batches_tracked", r"(.*\.)?position_ids"),
    *(r"(.*\.)?rope\w*\.freqs_\w+", r"(.*\.)?relative_position_index", r"local_cls_norm\..*"),
    r"auxiliary_head\..*",
)
# A text tower and what stands between it and the tower of pictures.
TEXT_TOWER = (
    *(r"text_model\..*", r"text_projection.*", r"token_embedding\..*", r"text\..*", "attn_mask"),
    *(r"ln_final\..*", "logit_scale", "logit_bias"),
    *("input_resolution", "context_length", "vocab_size"),
)


def _switch(config: ViTConfig, name: str) -> Any:
    """Look up a switch, or one of a decoder; None where there is none."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


@dataclass(frozen=True)
class Form:
    """A layout as it stands in one file.

    Attributes:
        layout: the layout.
        names: what stands for each name in keys.
        variants: of its rows, those that are not usual.
        chunks: groups that the blocks are in, whose numbers stand before theirs; 0: none.
    """

    layout: Layout
    names: dict[str, str]
    variants: frozenset[str] = frozenset()
    chunks: int = 0

    @classmethod
    def usual(cls, layout: Layout) -> Form:
        """Give a layout's usual form."""
        return cls(layout, {name: words[0] for name, words in layout.names.items()})

    def key(self, entry: Entry, block: int | str = 0) -> str:
        """Write a row's key, without chunks."""
        return entry.key.format(i=block, **self.names)

    def chosen(self, path: str) -> str:
        """Find the variant of the rows of a path."""
        found = {row.variant for row in self.layout.entries if row.path == path}
        return next(iter(found & self.variants), "")

    def rows(self, paths: Collection[str], qkv_bias: str) -> list[Entry]:
        """List the rows of a model, given its parameters' paths."""
        variants = {row.path: self.chosen(row.path) for row in self.layout.entries}
        return [
            row
            for row in self.layout.entries
            if (row.path in paths or row.path == PERIODS)
            and row.variant == variants[row.path]
            and not (row.key_bias and qkv_bias == "qv")
        ]

    def in_file(self, key: str, depth: int) -> str:
        """Write a key as the file has it, with the number of its block's group."""
        if not self.chunks:
            return key
        size = -(-depth // self.chunks)
        return re.sub(r"\bblocks\.(\d+)\.", lambda at: f"blocks.{int(at[1]) // size}.{at[1]}.", key)

    def expected(
        self, rows: Sequence[Entry], depths: Mapping[str, int]
    ) -> Iterator[tuple[str, Entry, int]]:
        """List every key with its row and block, in the order of PyTorch's own state dicts.

        Args:
            rows: the model's.
            depths: how many blocks each stack has, as `depths_of` counts them.
        """
        stacks = {name: [row for row in rows if row.stack == name] for name in STACKS}
        for row in rows:
            if not row.stack:
                yield self.key(row), row, 0
            elif row is stacks[row.stack][0]:
                blocks = stacks[row.stack]
                for number in range(depths[row.stack]):
                    yield from ((self.key(each, number), each, number) for each in blocks)

    def fitted(self, config: ViTConfig) -> Form:
        """Choose the variants that a model of another layout takes in this one."""
        chosen = set()
        for path in flatten(abstract_parameters(config)):
            ways = [row for row in self.layout.entries if row.path == path]
            fitting = [
                row.variant
                for row in ways
                if row.when is None or _switch(config, row.when[0]) == row.when[1]
            ]
            chosen |= set(fitting[:1])
        return dataclasses.replace(self, variants=frozenset(chosen - {""}))

    def as_json(self) -> dict[str, Any]:
        """Note what is not usual, for `model.json`."""
        usual = Form.usual(self.layout).names
        names = {name: word for name, word in self.names.items() if word != usual[name]}
        noted = {"names": names, "variants": sorted(self.variants), "chunks": self.chunks}
        return {name: value for name, value in noted.items() if value}

    @classmethod
    def from_json(cls, layout: Layout, noted: Mapping[str, Any]) -> Form:
        """Read what `as_json` noted."""
        names = {**cls.usual(layout).names, **noted.get("names", {})}
        return cls(layout, names, frozenset(noted.get("variants", ())), noted.get("chunks", 0))
