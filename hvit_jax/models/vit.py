"""The vision transformer: images, patches, tokens, segments of blocks, head."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.models.block import Block, LayerNorm, stack_blocks
from hvit_jax.models.decoders import Tap, make_decoder
from hvit_jax.models.pooling import AttentionPool, mean_of_patches
from hvit_jax.models.reducer import Layer, Reducer, TokenState
from hvit_jax.ops.precision import accumulator
from hvit_jax.ops.resizing import resize_map
from hvit_jax.pictures import Preprocessing, Windows

Output = TypeVar("Output", bound=Callable[..., Any])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Features:
    """Everything that `ViT.features` sees on the way.

    Attributes:
        tokens: the tokens after every block, each (B, N_i, C), the prefix first.
        states: the method's state after every block, with its trace of the patches.
        output: what `model(images)` returns.
        masks: a decoder's map before it is enlarged; None without one.
    """

    tokens: tuple[Float[Array, "B _ C"], ...]
    states: tuple[TokenState, ...]
    output: Float[Array, "B ..."]
    masks: Float[Array, "B h w n"] | None = None


def _empty_if_asked(output: Output) -> Output:
    """Let no images give no results: their shapes are those of one image's, without that axis.

    Kernels need not know of empty batches then, nor every operation of a method.
    """

    @functools.wraps(output)
    def run(self, images, *, draws=None):
        if images.ndim == 0 or images.shape[0] != 0:
            return output(self, images, draws=draws)
        structures = []

        def leaves(images):
            found, structure = jax.tree.flatten(output(self, images, draws=draws))
            structures.append(structure)
            return found

        shapes = jax.eval_shape(leaves, jnp.zeros((1, *images.shape[1:]), images.dtype))
        empty = (jnp.zeros((0, *leaf.shape[1:]), leaf.dtype) for leaf in shapes)
        return structures[0].unflatten(empty)

    return cast(Output, run)


class ViT(nnx.Module):
    """A plain vision transformer (Dosovitskiy et al. 2021) under a reduction method.

    Which one it is, SWAG's, DINOv2's or another, its configuration says. Blocks that run alike are
    stacked and scanned; see `segments`.

    Attributes:
        preprocessing: how its checkpoint wants pictures to be prepared.
        windows: how it wants them cut, of models that make maps.
    """

    preprocessing: Preprocessing = Preprocessing()
    windows: Windows = Windows()

    def __init__(
        self,
        config: ViTConfig,
        reducer: Reducer,
        *,
        rngs: nnx.Rngs,
        compute: Compute = Compute(),
        gather_weights: Callable[[Any], Any] | None = None,
    ):
        """Create the model with random weights; `hvit_jax.create` and `load` are the usual way.

        Args:
            config: the model's sizes.
            reducer: the method.
            rngs: draws the initial weights.
            compute: how it is computed.
            gather_weights: is called with each block's weights right before it runs, and returns
                those that it runs with; for weights of which every device holds a part.

        Raises:
            InputError: if the method's options do not fit the model.
        """
        self.config, self.reducer = config, reducer.resolve(config)
        self.compute, self.gather_weights = compute, gather_weights
        self.dtype, stored = compute.types

        self.patch_embed = nnx.Linear(
            3 * config.patch_size**2,
            config.width,
            use_bias=config.patch_bias,
            dtype=self.dtype,
            param_dtype=stored,
            rngs=rngs,
        )
        self._make_tokens(rngs)
        counts = [count for _, count in self.runs()]
        self.segments = nnx.List(stack_blocks(counts, config, compute=compute, rngs=rngs))
        self._make_end(rngs)
        self._check_restoring()

    def _check_restoring(self) -> None:
        """Refuse a place for the full grid's return that the method does not have.

        A method that never leaves the full grid, as the dense model, has no need of one.

        Raises:
            InputError: if there is none.
        """
        decoder, reducer, full = self.config.decoder, self.reducer, self.config.num_tokens
        if all(layer.tokens_out == full for layer in reducer.schedule(self.config)):
            return
        where = None if decoder is None else decoder.restore
        if where == "block" and getattr(reducer, "reconstruct_location", None) is None:
            raise InputError("restore 'block' needs reconstruct_location, an option of hourglass")
        if where == "masks" and not reducer.restores_masks:
            raise InputError(f"{reducer.name} cannot restore 'masks'; use 'tokens'")
        if where == "masks" and decoder is not None and decoder.taps:
            raise InputError(
                f"a decoder of the kind {decoder.kind!r} reads the full grid; restore 'tokens'"
            )

    def _make_tokens(self, rngs: nnx.Rngs) -> None:
        """Create what is added to the patches' projections, and what stands before them."""
        config, wide = self.config, accumulator(self.dtype)

        def table(entries: int) -> nnx.Param | None:
            if not entries:
                return None
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (entries, config.width), wide))

        def token(exists: bool) -> nnx.Param | None:
            return nnx.Param(jnp.zeros(config.width, wide)) if exists else None

        self.class_token = token(config.class_token)
        self.distillation_token = token(config.distillation_token)
        self.pos_embedding = table(config.position_entries)
        self.register_tokens = table(config.registers)
        self.ln_pre = self._norm(config.width, config.pre_norm, rngs)

    def _make_end(self, rngs: nnx.Rngs) -> None:
        """Create what follows the blocks."""
        config = self.config

        def linear(outputs: int, use_bias: bool = True) -> nnx.Linear | None:
            if not outputs:
                return None
            return nnx.Linear(config.feature_width, outputs, use_bias=use_bias, rngs=rngs)

        self.ln = self._norm(config.width, config.final_norm, rngs)
        pools = config.pool == "map"
        self.pool = AttentionPool(config, compute=self.compute, rngs=rngs) if pools else None
        self.pooled_ln = self._norm(config.feature_width, config.pooled_norm, rngs)
        self.projection = linear(config.projection, use_bias=False)
        self.head = linear(config.num_classes)
        second = config.num_classes if config.pool == "two heads" else 0
        self.distillation_head = linear(second)
        self.decoder = make_decoder(config, compute=self.compute, rngs=rngs)

    def _norm(self, width: int, exists: bool, rngs: nnx.Rngs) -> LayerNorm | None:
        if not exists:
            return None
        return LayerNorm(width, epsilon=self.config.norm_eps, dtype=self.dtype, rngs=rngs)

    def runs(self) -> list[tuple[Layer, int]]:
        """List the segments: a schedule entry and how many blocks in a row share it."""
        layers, taps = self.reducer.schedule(self.config), self.config.taps
        return segments(layers, unroll=self.compute.unroll, ends=taps)

    def __call__(
        self, images: Num[Array, "B H W 3"], *, draws: tuple[Any, ...] | None = None
    ) -> Float[Array, "B ..."]:
        """Compute what the model says of normalised images.

        Args:
            images: floating-point pictures of the model's resolution, normalised as the checkpoint
                says; see `hvit_jax.normalize`.
            draws: random numbers for every block, in place of the method's fixed ones.

        Returns:
            Logits in float32, or the projected feature; without a head or projection the pooled
            feature (B, C). With a decoder a map of the images' size: logits (B, H, W, classes), or
            depth (B, H, W, 1) in metres.

        Raises:
            InputError: if the images have another shape, or are integers.
        """
        return self.classify(images, draws=draws)[0]

    @_empty_if_asked
    def classify(
        self, images: Num[Array, "B H W 3"], *, draws: tuple[Any, ...] | None = None
    ) -> tuple[Float[Array, "B ..."], dict[str, Float[Array, " B"]]]:
        """Classify images, and tell what the method has to report of each of them.

        Arguments are as for calling the model.

        Returns:
            What `model(images)` returns, and `Reducer.report`.
        """
        if self.config.decoder is not None:
            masks, state = self._decode(images, draws)
            return resize_map(masks, self.config.image_shape), self.reducer.report(state)
        x, state, _ = self._encode(images, draws, trace=False)
        return self._finish(x, state), self.reducer.report(state)

    @_empty_if_asked
    def masks(
        self, images: Num[Array, "B H W 3"], *, draws: tuple[Any, ...] | None = None
    ) -> Float[Array, "B h w n"]:
        """Compute a decoder's map before it is enlarged to the images' size.

        Arguments are as for calling the model.

        Raises:
            InputError: if the model has no decoder.
        """
        return self._decode(images, draws)[0]

    @_empty_if_asked
    def features(
        self, images: Num[Array, "B H W 3"], *, draws: tuple[Any, ...] | None = None
    ) -> Features:
        """Classify images, and keep the tokens and the method's state after every block.

        Arguments are as for calling the model.
        """
        x, state, steps = self._encode(images, draws, trace=True, collect=True)
        tokens, states = zip(*steps.values(), strict=True)
        if self.config.decoder is None:
            return Features(tokens, states, self._finish(x, state))
        masks = self._map(x, state, steps)
        return Features(tokens, states, resize_map(masks, self.config.image_shape), masks)

    @_empty_if_asked
    def pooled(
        self, images: Num[Array, "B H W 3"], *, draws: tuple[Any, ...] | None = None
    ) -> Float[Array, "B C"]:
        """Compute the feature that a head reads, before any head or projection, in float32.

        Arguments are as for calling the model.
        """
        x, state, _ = self._encode(images, draws, trace=False)
        return self._pool(x, state)

    def image_embedding(
        self, images: Num[Array, "B H W 3"], *, draws: tuple[Any, ...] | None = None
    ) -> Float[Array, "B E"]:
        """Scale what the model returns to unit length, as CLIP compares pictures with texts.

        Arguments are as for calling the model.
        """
        output = self(images, draws=draws)
        return output / jnp.linalg.norm(output, axis=-1, keepdims=True)

    @_empty_if_asked
    def tokens(
        self, images: Num[Array, "B H W 3"], *, draws: tuple[Any, ...] | None = None
    ) -> dict[str, Float[Array, "B *shape C"]]:
        """Compute the final tokens, by name.

        Arguments are as for calling the model.

        Returns:
            "patches" (B, h, w, C), as `dense_features`, and of "cls" (B, C), "distillation" (B, C)
            and "registers" (B, R, C) those that the model has.
        """
        x, state, _ = self._encode(images, draws, trace=True)
        prefix = self._normed(x[:, : self.config.prefix_tokens])
        names = {"cls": self.config.class_token, "distillation": self.config.distillation_token}
        singles = [name for name, exists in names.items() if exists]
        found = {name: prefix[:, place] for place, name in enumerate(singles)}
        if self.config.registers:
            found["registers"] = prefix[:, len(singles) :]
        return {**found, "patches": self._on_grid(x, state)}

    @_empty_if_asked
    def dense_features(
        self, images: Num[Array, "B H W 3"], *, draws: tuple[Any, ...] | None = None
    ) -> Float[Array, "B h w C"]:
        """Compute a feature for every patch, for dense prediction with a reduced model.

        Arguments are as for calling the model.

        Returns:
            Features on the grid of patches after the last block, put back by `Reducer.restore` and
            normalised by the final LayerNorm if the model has one, in float32.
        """
        x, state, _ = self._encode(images, draws, trace=True)
        return self._on_grid(x, state)

    def embed(
        self, images: Num[Array, "B H W 3"], *, trace: bool
    ) -> tuple[Float[Array, "B N C"], TokenState]:
        """Make what enters the first block: tokens, the prefix first, and the method's state.

        Args:
            images: as for calling the model.
            trace: whether the state follows which token holds which patch.
        """
        if images.ndim != 4 or images.shape[1:] != (*self.config.image_shape, 3):
            height, width = self.config.image_shape
            raise InputError(
                f"the model takes images of shape (batch, {height}, {width}, 3), got "
                f"{tuple(images.shape)}; load it with resolution= for another size"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"the model takes normalised images, got {images.dtype}; make them of pixels from "
                "0 to 255 by hvit_jax.normalize(pixels, mean, std), of model.preprocessing"
            )
        patches = self.patch_embed(patchify(images.astype(self.dtype), self.config.patch_size))
        patches = patches.astype(accumulator(self.dtype))
        x = jnp.concatenate([*self._prefix(images.shape[0]), patches], axis=1)
        if self.pos_embedding is not None:
            x = x + self._positions()[None]
        x = x.astype(self.dtype)
        x = x if self.ln_pre is None else self.ln_pre(x)
        return x, self.reducer.init(x, self.config, trace=trace)

    def _prefix(self, batch) -> Iterator[Float[Array, "B K C"]]:
        """Give the tokens that stand before the patches."""
        for token in (self.class_token, self.distillation_token, self.register_tokens):
            if token is not None:
                rows = token[...].reshape(1, -1, self.config.width)
                yield jnp.broadcast_to(rows, (batch, *rows.shape[1:]))

    def _positions(self) -> Float[Array, "N C"]:
        """Give each token what is added to it: 0 to those that the table has no entry for."""
        assert self.pos_embedding is not None
        table, first = self.pos_embedding[...], self.config.position_prefix
        if first == self.config.prefix_tokens:
            return table
        none = jnp.zeros((self.config.prefix_tokens - first, table.shape[1]), table.dtype)
        return jnp.concatenate([table[:first], none, table[first:]])

    def block_at(self, index: int) -> tuple[Block, Layer, Any]:
        """Take one block out of its segment: the block, its schedule entry and its draws."""
        start = 0
        for blocks, (layer, count) in zip(self.segments, self.runs(), strict=True):
            if index < start + count:
                graph, weights = nnx.split(blocks)
                only = jax.tree.map(lambda leaf, place=index - start: leaf[place], weights)
                return nnx.merge(graph, only), layer, self.reducer.draws(self.config)[index]
            start += count
        raise IndexError(f"the model's blocks are 0 to {self.config.depth - 1}, got {index}")

    def _encode(self, images, draws, *, trace: bool, collect: bool = False):
        """Run all blocks: tokens and state after the last, and after some by their numbers.

        Those are all if that is asked for, else the decoder's taps.
        """
        x, state = self.embed(images, trace=trace)
        steps, count = {}, 0
        for blocks, layer, drawn in self._segments(draws):
            (x, state), collected = self._run(x, state, blocks, layer, drawn, collect=collect)
            steps.update(enumerate(collected, count))
            count += len(drawn)
            if count - 1 in self.config.taps:
                steps[count - 1] = x, state
        return x, state, steps

    def _decode(self, images, draws):
        """Run all blocks and the decoder: its map, and the method's state after the last block."""
        if self.config.decoder is None:
            raise InputError("the model has no decoder; its features are model.dense_features")
        x, state, steps = self._encode(images, draws, trace=True)
        return self._map(x, state, steps), state

    def _map(self, x, state, steps: dict[int, Any]) -> Float[Array, "B h w n"]:
        """Make the decoder's map, of the final tokens or of those behind its taps."""
        decoder, prefix = self.config.decoder, self.config.prefix_tokens
        assert decoder is not None and self.decoder is not None
        if decoder.taps:
            return self.decoder([self._tap(*steps[block]) for block in decoder.taps])
        if self.reducer.spreads_masks(self.config):
            masks = self.decoder(self._normed(x)[:, prefix:])
            masks = jnp.pad(masks, ((0, 0), (prefix, 0), (0, 0)))
            masks = self.reducer.restore(masks, state)
        else:
            masks = self.decoder(self._restored(x, state, self._normed))
        return masks.reshape(x.shape[0], *self.config.grid, -1)

    def _tap(self, x, state) -> Tap:
        """Give a head what it reads of a block; depth is read of what is not normalised."""
        decoder = self.config.decoder
        assert decoder is not None
        norm = self._normed if decoder.task == "segmentation" else self._widened
        patches = self._restored(x, state, norm).reshape(x.shape[0], *self.config.grid, -1)
        return Tap(patches, norm(x[:, 0]))

    def _restored(self, x, state, norm) -> Float[Array, "B P C"]:
        """Normalise tokens, then put them back on the full grid."""
        return self.reducer.restore(norm(x), state.with_dropped(norm))

    def _widened(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
        return x.astype(accumulator(self.dtype))

    def _segments(self, draws) -> Iterator[tuple[Block, Layer, tuple[Any, ...]]]:
        draws = self.reducer.draws(self.config) if draws is None else draws
        if len(draws) != self.config.depth:
            raise InputError(f"draws must have {self.config.depth} entries, got {len(draws)}")
        remaining = iter(draws)
        for blocks, (layer, count) in zip(self.segments, self.runs(), strict=True):
            yield blocks, layer, tuple(itertools.islice(remaining, count))

    def _run(self, x, state, blocks, layer, draws, *, collect):
        graph, weights = nnx.split(blocks)

        def step(carry, inputs):
            weights = inputs[0] if self.gather_weights is None else self.gather_weights(inputs[0])
            block = nnx.merge(graph, weights)
            carry = self.reducer.block(block, *carry, layer, inputs[1])
            # Bare leaves: a stack of states would not have the shapes that a state declares.
            return carry, jax.tree.leaves(carry) if collect else None

        if len(draws) == 1:
            step = jax.checkpoint(step) if self.compute.remat else step
            only = jax.tree.map(lambda leaf: leaf[0], weights)
            carry, _ = step((x, state), (only, draws[0]))
            return carry, [carry] if collect else []
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
        # A loop's body needs no barriers against merging the second computation with the first.
        step = jax.checkpoint(step, prevent_cse=False) if self.compute.remat else step
        carry, leaves = jax.lax.scan(step, (x, state), (weights, stacked))
        if not collect:
            return carry, []
        structure = jax.tree.structure(carry)
        blocks = range(len(draws))
        return carry, [structure.unflatten([leaf[i] for leaf in leaves or ()]) for i in blocks]

    def _normed(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
        """Normalise final tokens, in float32, if the model does so before it pools them."""
        x = self._widened(x)
        return x if self.ln is None else self.ln(x)

    def _on_grid(self, x, state) -> Float[Array, "B h w C"]:
        patches = self._normed(self.reducer.restore(x, state))
        return patches.reshape(x.shape[0], *self.config.grid, -1)

    def _finish(self, x, state) -> Float[Array, "B classes"]:
        feature = self._pool(x, state)
        feature = feature if self.projection is None else self.projection(feature)
        if self.head is None:
            return feature
        if self.distillation_head is None:
            return self.head(feature)
        second = self.distillation_head(self._normed(x[:, 1]))
        return (self.head(self._normed(x[:, 0])) + second) / 2

    def _pool(self, x, state) -> Float[Array, "B C"]:
        """Make one feature of the final tokens, in float32."""
        config, wide = self.config, accumulator(self.dtype)
        normed = self._widened if config.pool_before_norm else self._normed
        patches, sizes = slice(config.prefix_tokens, None), self.reducer.patch_sizes(x, state)
        if config.pool == "cls":
            feature = normed(x[:, 0])
        elif config.pool == "two heads":
            feature = normed(x[:, :2]).mean(1)
        elif config.pool == "avg":
            feature = mean_of_patches(normed(x[:, patches]), sizes)
        elif config.pool == "cls+avg":
            mean = mean_of_patches(normed(x[:, patches]), sizes)
            feature = jnp.concatenate([normed(x[:, 0]), mean], axis=-1)
        else:
            assert self.pool is not None
            prefix = config.prefix_tokens * config.pool_prefix
            if prefix and sizes is not None:
                sizes = jnp.pad(sizes, ((0, 0), (prefix, 0)), constant_values=1)
            pooled = x if config.pool_prefix else x[:, patches]
            feature = self.pool(normed(pooled).astype(self.dtype), sizes).astype(wide)
        return feature if self.pooled_ln is None else self.pooled_ln(feature)


def segments(
    layers: tuple[Layer, ...], *, unroll: bool = False, ends: tuple[int, ...] = ()
) -> list[tuple[Layer, int]]:
    """Group consecutive blocks that can share one scanned program.

    Blocks share it if their entries are equal and keep the token count.

    Args:
        layers: the schedule.
        unroll: give every block a segment of its own.
        ends: blocks that end a segment.

    Returns:
        For every segment the entry of its blocks, and how many there are.
    """
    runs: list[tuple[Layer, int]] = []
    for index, layer in enumerate(layers):
        same = runs and runs[-1][0] == layer and layer.tokens_in == layer.tokens_out
        if same and not unroll and index - 1 not in ends:
            runs[-1] = (layer, runs[-1][1] + 1)
        else:
            runs.append((layer, 1))
    return runs


def patchify(images: Num[Array, "B H W 3"], patch_size: int) -> Float[Array, "B P D"]:
    """Cut images into flattened patches: row-major, each (row, column, channel)."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return cut.swapaxes(2, 3).reshape(batch, rows * columns, -1)
