"""ATS: every image keeps as many tokens as its attention is spread over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, TokenState, initial_state
from hvit_jax.ops import flops
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.sampling import (
    masked_weights,
    mean_rows,
    new_places,
    sample_tokens,
    significance,
)
from hvit_jax.ops.selection import behind_prefix
from hvit_jax.reducers.budgeted import Budgeted


@dataclass(frozen=True)
class SampleLayer(Layer):
    """A block that samples tokens, at `points` points."""

    points: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ATSState(TokenState):
    """Trace of the patches, and how many tokens each image has.

    Attributes:
        lengths: tokens of each image, the prefix included; they stand in front.
        rows: the same with the padding that counts: what blocks that do not sample attend to.
        over_budget: 1 for an image that sampled more tokens than a budget allowed, else 0.
    """

    lengths: Int[Array, " B"]
    rows: Int[Array, " B"]
    over_budget: Float[Array, " B"]


@dataclass(frozen=True)
class ATS(Budgeted):
    """Adaptive token sampling.

    Fayyaz et al. 2022, "Adaptive Token Sampling For Efficient Vision Transformers", arXiv
    2111.15667.

    In each block of `blocks` a patch token's score is the attention that CLS pays to it (in a model
    without CLS: all patches on average), times the norm of its value. As many points as the picture
    has patches are spread evenly over the summed up scores, and the tokens that they fall on stay:
    few if a few tokens hold most of the score, many if it is spread out. Attention is computed for
    the rows of the tokens that stay only.

    So images keep different numbers of tokens. Shapes stay static nevertheless: each image's tokens
    stand in front, CLS first and the others in ascending order of score, within a budget of
    `max_tokens` rows, and what lies behind them is masked. Budgets save time; `hvit calibrate`
    measures which ones a set of images needs.

    Differs from the original: by default (`padding="none"`) each image is treated as if it were
    alone. "batch" and "all" give the original's results on batches, in which an image that holds
    fewer tokens than another, or than the input, also samples its lowest-scoring token, and later
    blocks that do not sample attend to its padding. The original's softmax adds 1e-6 to its sums.
    That is kept where scores are computed; under "none" the tokens' own attention is the ordinary
    one, in which every weight is within 1e-6 of the original's.
    """

    name: ClassVar[str] = "ats"
    budget_option: ClassVar[str] = "max_tokens"

    blocks: tuple[int, ...] | None = option(
        None, "sample in these blocks (default: the last quarter; the last half of 32 or more)"
    )
    max_tokens: int | tuple[int, ...] | None = option(
        None,
        "rows kept after sampling, CLS included: one number or one a block (default: all)",
    )
    padding: str = option(
        "none",
        "none: each image as if alone; batch, all: the original's padding to the longest image or "
        "to all tokens",
        choices=("none", "batch", "all"),
    )
    residual: str | None = option(
        None,
        "normalized: add attention to ln_1(x), as the original; input: to x, as the paper "
        "(default: normalized for SWAG's models, input for others)",
        choices=("normalized", "input"),
    )

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[ATS]:
        """Vary a budget for all blocks from a quarter of the depth on, as in the paper.

        See `Reducer.strengths`.
        """
        blocks = tuple(range(config.depth // 4, config.depth))
        least = max(2, config.prefix_tokens + 1)
        budgets = (max(least, round(f * config.num_tokens)) for f in steps())
        return (cls(blocks=blocks, max_tokens=budget) for budget in budgets)

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[ATS]:
        """Try to sample from three blocks on; see `Reducer.candidates`."""
        starts = config.blocks_at(1 / 4, 1 / 2, 3 / 4)
        return (cls(blocks=tuple(range(start, config.depth))) for start in starts)

    def resolve(self, config: ViTConfig) -> ATS:
        """Fill in blocks and budgets; see `Reducer.resolve`."""
        blocks, last = self.budget_blocks(config), config.depth - 1
        self.check(len(blocks) > 0, "blocks", "name at least one block")
        inside = all(0 <= block <= last for block in blocks)
        self.check(inside, "blocks", f"the model's blocks are 0 to {last}")
        ascending = tuple(sorted(set(blocks)))
        self.check(blocks == ascending, "blocks", f"in ascending order, each once: {ascending}")
        self.check_budgets(config, least=max(2, config.prefix_tokens + 1))
        budgets, total = self.budgets(config), config.num_tokens
        wanted = f"keeps all {total} rows, whatever max_tokens; use 'none' or 'batch' for budgets"
        self.check(self.padding != "all" or min(budgets) == total, "padding", wanted)
        swag = config.position_embedding and config.position_resizing == "swag"
        residual = "normalized" if swag else "input"
        return dataclasses.replace(
            self, blocks=blocks, max_tokens=budgets, residual=self.residual or residual
        )

    def budget_blocks(self, config: ViTConfig) -> tuple[int, ...]:
        """List the blocks that sample."""
        if self.blocks is not None:
            return self.blocks
        start = config.depth // 2 if config.depth >= 32 else 3 * config.depth // 4
        return tuple(range(start, config.depth))

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """All tokens up to the first sampling, then each block's budget, or less before it."""
        blocks, layers = self.budget_blocks(config), []
        budgets = dict(zip(blocks, self.budgets(config), strict=True))
        rows = config.num_tokens
        for index in range(config.depth):
            if index in budgets:
                kept = min(rows, budgets[index])
                layers.append(SampleLayer(rows, kept, "sample", points=config.num_patches))
                rows = kept
            else:
                layers.append(Layer(rows, rows, "dense" if index < blocks[0] else "padded"))
        return tuple(layers)

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> ATSState:
        """Make the state before the first block; see `Reducer.init`."""
        batch, tokens, _ = x.shape
        return ATSState(
            **initial_state(x, config, trace=trace, by_image=True),
            lengths=jnp.full(batch, tokens, jnp.int32),
            rows=jnp.full(batch, tokens, jnp.int32),
            over_budget=jnp.zeros(batch),
        )

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: ATSState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], ATSState]:
        """Sample tokens if this is a block to do so; run the block without its padding."""
        if isinstance(layer, SampleLayer):
            return self._sample(block, x, state, layer)
        if layer.mode == "padded":
            qkv = block.qkv(x, state.coordinates, apart="qkv")
            x = x + block.attend_and_project(*qkv, key_lengths=state.rows)
            return x + block.mlp(x), state
        return block(x, state.coordinates), state

    def _sample(self, block, x, state, layer):
        qkv = block.qkv(x, state.coordinates, apart="qkv")
        q, k, v = (each.array for each in qkv)
        valid = jnp.arange(layer.tokens_in)[None] < state.lengths[:, None]
        # The tokens stand in their places' order, so that masks of queries and keys are the same.
        if block.class_token:
            weights = masked_weights(q[:, :1], k, valid, state.rows)[:, :, 0]
        else:
            queries = valid & (jnp.arange(layer.tokens_in) >= state.prefix)[None]
            weights = mean_rows(q, k, queries, valid, state.rows)
        patches, count = self._choose(weights, v, valid, state, layer)
        kept = behind_prefix(patches, state.prefix)
        lengths = jnp.minimum(count, layer.tokens_out)
        exists = jnp.arange(layer.tokens_out)[None] < lengths[:, None]
        q, out = gather(q, kept), gather(x, kept)
        out = block.ln_1(out) if self.residual == "normalized" else out
        out = out + block.project(self._attend(block, q, k, v, valid, state))
        out = jnp.where(exists[..., None], out + block.mlp(out), 0)
        state = dataclasses.replace(
            state.moved(x, new_places(kept, exists, tokens=layer.tokens_in)),
            coordinates=state.coordinates_of(patches),
            lengths=lengths,
            rows=self._rows(lengths, layer.points + state.prefix),
            over_budget=jnp.where(count > lengths, 1.0, state.over_budget),
        )
        return out, state

    def _choose(self, weights, v, valid, state: ATSState, layer: SampleLayer):
        """Sample patches; their number, with the prefix, may be more than there is room for."""
        patches, count = sample_tokens(
            significance(weights, v, prefix=state.prefix),
            valid[:, state.prefix :],
            state.lengths < state.rows,
            points=layer.points,
            limit=layer.tokens_out - state.prefix,
        )
        return patches, count + state.prefix

    def _attend(self, block, q, k, v, valid, state):
        if self.padding == "none":
            return block.attend(q, k, v, key_lengths=state.lengths)
        weights = masked_weights(q, k, valid, state.rows)
        return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v.dtype), v)

    def _rows(self, lengths, full):
        if self.padding == "none":
            return lengths
        return jnp.full_like(lengths, lengths.max() if self.padding == "batch" else full)

    def patch_sizes(self, x: Float[Array, "B N C"], state: ATSState) -> Float[Array, "B M"]:
        """Count every token once, and padding not at all; see `Reducer.patch_sizes`."""
        places = jnp.arange(state.prefix, x.shape[1])[None]
        return (places < state.lengths[:, None]).astype(jnp.float32)

    def report(self, state: ATSState) -> dict[str, Float[Array, " B"]]:
        """Tell which images sampled more tokens than a budget allowed."""
        return {"ats_images_over_budget": state.over_budget}

    def counts(self, state: ATSState) -> dict[str, Int[Array, "B 1"]]:
        """Count the tokens that stay, CLS included."""
        return {"tokens": state.lengths[:, None]}

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count attention on all tokens that enter, and the rest on those that stay."""
        if not isinstance(layer, SampleLayer):
            return super().block_flops(config, layer)
        tokens = layer.tokens_in
        scores = flops.queries_keys_values(config, tokens) + flops.attention(config, tokens, tokens)
        scores += 0 if config.class_token else tokens**2
        kept = layer.tokens_out
        return scores + flops.projection(config, kept) + flops.mlp(config, kept)
