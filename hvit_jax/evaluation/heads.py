"""What makes logits of features where a model has no head: linear maps, and neighbours' votes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import Anywhere

TEMPERATURE = 0.07  # DINO's.
_CHUNK = 1 << 14  # Training pictures that a batch is compared with at once.
_HIGHEST = jax.lax.Precision.HIGHEST
_NO_LABEL = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Linear:
    """A linear map of features, or of their directions.

    Attributes:
        kernel: one column a class.
        bias: of every class.
        normalised: whether features are divided by their lengths first.
    """

    votes: ClassVar[bool] = False
    kernel: Float[Anywhere, "C classes"]
    bias: Float[Anywhere, " classes"]
    normalised: bool = field(default=False, metadata={"static": True})

    def __call__(self, features: Float[Array, "B C"]) -> Float[Array, "B classes"]:
        """Give the logits of features."""
        features = unit_length(features) if self.normalised else features
        return jnp.dot(features, self.kernel, precision=_HIGHEST) + self.bias


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Neighbours:
    """The vote of the k training pictures whose features are most like a picture's.

    As Caron et al. 2021 (arXiv 2104.14294) evaluate DINO: features are likened by their cosine, and
    a neighbour's vote weighs `exp(cosine / 0.07)`. `of_training` makes it.

    Attributes:
        features: of unit length, in chunks, so that a batch is never compared with all of them at
            once; zeros fill up the last chunk.
        labels: the class of each; -1 for what fills up.
        classes: how many there are.
        k: neighbours that vote.
    """

    votes: ClassVar[bool] = True
    features: Float[Anywhere, "chunks N C"]
    labels: Int[Anywhere, "chunks N"]
    classes: int = field(metadata={"static": True})
    k: int = field(metadata={"static": True})

    @classmethod
    def of_training(
        cls, features: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], classes: int, k: int
    ) -> Neighbours:
        """Make it of training pictures, at least `k` of them."""
        chunks, places = in_chunks(unit_rows(features), labels)
        return cls(chunks, places, classes, k)

    def __call__(self, features: Float[Array, "B C"]) -> Float[Array, "B classes"]:
        """Give every class' share of the votes, which add up to 1."""
        cosines, labels = self.nearest(unit_length(features))
        weights = jax.nn.softmax(cosines / TEMPERATURE, axis=-1)
        votes = jax.nn.one_hot(labels, self.classes, dtype=weights.dtype)
        return jnp.einsum("bk,bkc->bc", weights, votes, precision=_HIGHEST)

    def nearest(
        self, features: Float[Array, "B C"]
    ) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
        """Find the nearest training pictures of features of unit length: cosines and labels."""

        def compare(best, chunk):
            features_there, labels_there = chunk
            cosines = jnp.dot(features, features_there.T, precision=_HIGHEST)
            cosines = jnp.where(labels_there == _NO_LABEL, -jnp.inf, cosines)
            labels = jnp.broadcast_to(labels_there, cosines.shape)
            cosines = jnp.concatenate([best[0], cosines], axis=1)
            labels = jnp.concatenate([best[1], labels], axis=1)
            cosines, places = jax.lax.top_k(cosines, self.k)
            return (cosines, jnp.take_along_axis(labels, places, axis=1)), None

        shape = (len(features), self.k)
        none = jnp.full(shape, -jnp.inf), jnp.full(shape, _NO_LABEL, jnp.int32)
        best, _ = jax.lax.scan(compare, none, (self.features, self.labels))
        return best


Head = Linear | Neighbours
_SHORT = 1e-12  # Features are divided by no shorter lengths.


def unit_length(features: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
    """Divide features by their lengths."""
    lengths = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return features / jnp.maximum(lengths, _SHORT)


def unit_rows(features: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "N C"]:
    """Divide features by their lengths, on the host."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, _SHORT)


def in_chunks(
    features: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], *, multiple: int = 1
) -> tuple[Float[np.ndarray, "chunks rows C"], Int[np.ndarray, "chunks rows"]]:
    """Cut training pictures into chunks of equal length; zeros with the label -1 fill up the last.

    Args:
        features: theirs.
        labels: their classes.
        multiple: what a chunk's length is to be a multiple of.
    """
    rows = -(-min(_CHUNK, len(labels)) // multiple) * multiple
    chunks = -(-len(labels) // rows)
    filled = np.zeros((chunks * rows, features.shape[1]), np.float32)
    filled[: len(features)] = features
    places = np.full(chunks * rows, _NO_LABEL, np.int32)
    places[: len(labels)] = labels
    return filled.reshape(chunks, rows, -1), places.reshape(chunks, rows)
