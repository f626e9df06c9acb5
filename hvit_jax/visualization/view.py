"""What a block does with an image: which patches it treats as one, and what CLS attends to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from hvit_jax.config import Preprocessing
from hvit_jax.data.preprocess import normalize
from hvit_jax.errors import InputError
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState
from hvit_jax.models.vit import ViT, part_weights
from hvit_jax.ops.arrays import Anywhere, gather
from hvit_jax.ops.attention import attention_weights
from hvit_jax.ops.platform import compiler_options
from hvit_jax.reducers import Budgeted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockView:
    """One block's view of images.

    Attributes:
        groups: for every patch the group that it shares its fate with, -1 if it is dropped or left
            out; see `Reducer.groups`.
        attention: how much of CLS's attention, averaged over heads, each patch gets; a token that
            holds several shares it among them. It sums to 1 with CLS's attention to itself.
        tokens: how many there are after the block, CLS included.
    """

    groups: Int[Anywhere, "B P"]
    attention: Float[Anywhere, "B P"]
    tokens: Int[Anywhere, " B"]


def compile_views(
    model: ViT, blocks: Sequence[int], preprocessing: Preprocessing = Preprocessing()
) -> Callable[[UInt8[np.ndarray, "B H W 3"]], tuple[list[BlockView], Float[Array, "B classes"]]]:
    """Compile the views of some blocks.

    Args:
        model: a model under any method.
        blocks: which blocks, counted from 0.
        preprocessing: the checkpoint's, whose mean and deviation normalise the pictures.

    Returns:
        A function of uint8 pictures: a view for each of `blocks`, and the model's output.

    Raises:
        InputError: if the model has no such block.
    """
    last = model.config.depth - 1
    for block in blocks:
        if not 0 <= block <= last:
            raise InputError(f"block {block}: the model's blocks are 0 to {last}")
    with_weights, weights = part_weights(model)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def views(weights, pixels):
        model = with_weights(weights)
        images = normalize(pixels, preprocessing.mean, preprocessing.std)
        features = model.features(images)
        after = zip(features.tokens, features.states, strict=True)
        steps = [model.embed(images, trace=True), *after]
        found = [_view(model, block, *steps[block], steps[block + 1][1]) for block in blocks]
        return found, features.output

    return lambda pixels: views(weights, pixels)


def _view(model: ViT, index: int, x, before, after) -> BlockView:
    """Run a block once more, and watch it."""
    block, layer, draws = model.block_at(index)
    groups = model.reducer.groups(block, x, after, layer, draws)
    seen = _watch(block)
    model.reducer.block(block, x, before, layer, draws)
    attention = attention_weights(**seen).mean(1)[:, 0]
    source = model.reducer.attended_source(before, after, layer)
    assert source is not None, "both states are traced"
    tokens = _tokens(model.reducer, after, layer, len(x))
    return BlockView(groups, _share_among_patches(attention, source), tokens)


def _tokens(reducer: Reducer, after: TokenState, layer: Layer, batch: int) -> Int[Array, " B"]:
    """Count the tokens after a block; a method that counts them fills a budget only in part."""
    counted = reducer.counts(after).get("tokens") if isinstance(reducer, Budgeted) else None
    return jnp.full(batch, layer.tokens_out) if counted is None else counted[:, 0]


def _watch(block: Block) -> dict[str, Any]:
    """Let a block note what it compares CLS with, as `attention_weights` takes it."""
    seen: dict[str, Any] = {}
    qkv, attend = block.qkv, block.attend

    def noting_qkv(x: Float[Array, "B N C"], coordinates: Float[Array, "b P 2"] | None = None):
        q, k, v = qkv(x, coordinates)
        seen.update(q=q[:, :1], k=k)
        return q, k, v

    def noting_attend(q, k, v, **options):
        if k is seen["k"]:  # Not what a method made of them: ACT's means, for instance.
            seen.update(options)
        return attend(q, k, v, **options)

    block.qkv, block.attend = noting_qkv, noting_attend
    return seen


def _share_among_patches(
    attention: Float[Array, "B N"], source: Int[Array, "B P"]
) -> Float[Array, "B P"]:
    """Give each patch its share of the attention that its token gets; 0 without a token there."""
    held = (source >= 0) & (source < attention.shape[1])
    places = jnp.where(held, source, 0)
    tokens = jnp.where(held, places, -1)[..., None] == jnp.arange(attention.shape[1])[None, None]
    members = jnp.maximum(tokens.sum(1), 1).astype(attention.dtype)
    return jnp.where(held, gather(attention / members, places), 0)
