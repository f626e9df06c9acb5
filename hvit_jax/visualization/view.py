"""What a block does with an image: which patches it treats as one, and what gets attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from hvit_jax.config import ViTConfig
from hvit_jax.data.preprocess import normalize
from hvit_jax.errors import InputError
from hvit_jax.models.block import Block
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.reducer import Layer, Reducer, TokenState
from hvit_jax.models.vit import ViT
from hvit_jax.ops.arrays import Anywhere, gather
from hvit_jax.ops.attention import Heads, array_of, attention_weights
from hvit_jax.ops.attention.xla import count_meetings
from hvit_jax.ops.grouping import copy_to_members
from hvit_jax.ops.platform import compiler_options
from hvit_jax.ops.precision import accurate_einsum
from hvit_jax.pictures import Preprocessing
from hvit_jax.reducers import Budgeted


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockView:
    """One block's view of images.

    Attributes:
        groups: for every patch the group that it shares its fate with, -1 if it is dropped or left
            out; see `Reducer.groups`.
        attention: how much of CLS's attention, averaged over heads, each patch gets; in a model
            without CLS, of that of all patches on average. A token that holds several patches
            shares it among them. It sums to 1 with what the tokens before the patches get.
        tokens: how many there are after the block, those before the patches included.
    """

    groups: Int[Anywhere, "B P"]
    attention: Float[Anywhere, "B P"]
    tokens: Int[Anywhere, " B"]


def compile_views(
    model: ViT, blocks: Sequence[int], preprocessing: Preprocessing | None = None
) -> Callable[[UInt8[np.ndarray, "B H W 3"]], tuple[list[BlockView], Float[Array, "B classes"]]]:
    """Compile the views of some blocks.

    Args:
        model: a model under any method.
        blocks: which blocks, counted from 0.
        preprocessing: whose mean and deviation normalise the pictures; None: the model's.

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
    how = model.preprocessing if preprocessing is None else preprocessing

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def views(weights, pixels):
        model = with_weights(weights)
        images = normalize(pixels, how.mean, how.std)
        features = model.features(images)
        after = zip(features.tokens, features.states, strict=True)
        steps = [model.embed(images, trace=True), *after]
        found = [_view(model, block, *steps[block], steps[block + 1][1]) for block in blocks]
        return found, features.output

    return lambda pixels: views(weights, pixels)


def whose_attention(config: ViTConfig) -> str:
    """Name what `BlockView.attention` shows of a model."""
    return "attention of CLS" if config.class_token else "attention of the patches"


def _view(model: ViT, index: int, x, before, after) -> BlockView:
    """Run a block once more, and watch it."""
    block, layer, draws = model.block_at(index)
    groups = model.reducer.groups(block, x, after, layer, draws)
    seen = _watch(block)
    model.reducer.block(block, x, before, layer, draws)
    source = model.reducer.attended_source(block, x, before, after, layer)
    assert source is not None, "both states are traced"
    q, k = (array_of(seen.pop(name)) for name in ("q", "k"))
    attention = _attention(source, model.config.class_token, q=q, k=k, **seen)
    return BlockView(groups, attention, _tokens(model.reducer, after, layer, len(x)))


def _tokens(reducer: Reducer, after: TokenState, layer: Layer, batch: int) -> Int[Array, " B"]:
    """Count the tokens after a block; a method that counts them fills a budget only in part."""
    counted = reducer.counts(after).get("tokens") if isinstance(reducer, Budgeted) else None
    return jnp.full(batch, layer.tokens_out) if counted is None else counted[:, 0]


def _watch(block: Block) -> dict[str, Any]:
    """Let a block note what it compares, as `_attention` takes it."""
    seen: dict[str, Any] = {}
    project, rotate, average = block.project_qkv, block.rotate, block.average_groups
    attend, in_clusters = block.attend, block.attend_in_clusters

    def noting_qkv(
        x: Float[Array, "B N C"], coordinates: Float[Array, "b P 2"] | None = None, **options: str
    ):
        q, k, v = project(x, coordinates, **options)
        seen.update(q=q, k=k)
        return q, k, v

    def follow(before: Heads | Array, after: Heads | Array) -> None:
        """Note what a method makes of its queries or keys in their place."""
        seen.update({name: after for name in ("q", "k") if before is seen.get(name)})

    def noting_rotate(x, coordinates):
        turned = rotate(x, coordinates)
        follow(x, turned)
        return turned

    def noting_average(x, groups):
        means = average(x, groups)
        # The mean of a group gets as much attention as its members would, were they all like it.
        follow(x, copy_to_members(means, groups))
        return means

    def noting_attend(q, k, v, *, factor=None, **options):
        if k is seen["k"]:  # Not the means of groups, whose weights tell how large they are.
            seen.update(options)
        return attend(q, k, v, factor=factor, **options)

    def noting_in_clusters(*arrays, clusters):
        seen.update(zip(("q_clusters", "k_clusters"), arrays[3:], strict=True))
        return in_clusters(*arrays, clusters=clusters)

    block.project_qkv, block.rotate = noting_qkv, noting_rotate
    block.average_groups = noting_average
    block.attend, block.attend_in_clusters = noting_attend, noting_in_clusters
    return seen


def _attention(
    source: Int[Array, "B P"],
    class_token: bool,
    *,
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    q_clusters: Int[Array, "B H R N"] | None = None,
    k_clusters: Int[Array, "B H R N"] | None = None,
    **options: Any,
) -> Float[Array, "B P"]:
    """Give each patch its share of the attention of CLS, or else of all patches on average.

    Args:
        source: for every patch the token that holds it while the block attends; -1 if none does.
        class_token: whether the first token is CLS.
        q: queries.
        k: keys.
        q_clusters: the queries' clusters, where attention stays inside clusters.
        k_clusters: the keys'.
        **options: those of `attention_weights`.
    """
    rows = slice(0, 1 if class_token else None)
    weights = attention_weights(q[:, rows], k, **options)
    if q_clusters is not None and k_clusters is not None:
        meetings = count_meetings(q_clusters[..., rows], k_clusters)
        weights = weights * meetings.astype(weights.dtype)
        weights = weights / weights.sum(-1, keepdims=True)
    # Sources beyond the tokens are those of patches that this block leaves out.
    members = (source[..., None] == jnp.arange(k.shape[1])[None, None]).sum(1).astype(weights.dtype)
    of_patches = members / members.sum(1, keepdims=True)
    of_queries = jnp.ones_like(members[:, :1]) if class_token else of_patches
    attention = accurate_einsum("bq,bhqk->bk", of_queries, weights) / weights.shape[1]
    held = (source >= 0) & (source < k.shape[1])
    shares = gather(attention / jnp.maximum(members, 1), jnp.where(held, source, 0))
    return jnp.where(held, shares, 0)
