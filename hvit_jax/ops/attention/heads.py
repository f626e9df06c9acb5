"""Queries, keys and values: arrays, or parts of the one array in which a product puts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Float

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """Some heads of an array.

    What attends takes them as they are: a kernel that can reads them where they lie. Everything
    else takes `array`. XLA reads it in place too for a sum or a mean, but copies it for a product.

    Attributes:
        whole: an array (B, N, G, D) that may hold other heads too. JAX puts other objects there
            where it matches trees.
        first: the number of the first of these.
        count: how many they are.
    """

    whole: Any
    first: int = field(metadata=_STATIC)
    count: int = field(metadata=_STATIC)

    @classmethod
    def of(cls, x: Float[Array, "B N H D"] | Heads) -> Heads:
        """Take all heads of an array."""
        return x if isinstance(x, Heads) else cls(x, 0, x.shape[2])

    @property
    def array(self) -> Float[Array, "B N H D"]:
        """Cut these heads out."""
        if self.count == self.whole.shape[2]:
            return self.whole
        return self.whole[:, :, self.first : self.first + self.count]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Give that of `array`."""
        batch, tokens, _, size = self.whole.shape
        return batch, tokens, self.count, size

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """Give that of `array`."""
        return self.whole.dtype


def array_of(x: Float[Array, "B N H D"] | Heads) -> Float[Array, "B N H D"]:
    """Cut heads out of their array, if they are not one already."""
    return x.array if isinstance(x, Heads) else x
