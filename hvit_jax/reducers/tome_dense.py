"""ToMe for dense prediction: merge tokens around attention and MLP, and put them back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState
from hvit_jax.ops import flops
from hvit_jax.ops.matching import match_tokens
from hvit_jax.ops.merging import average_tokens, unmerge_tokens


@dataclass(frozen=True)
class MergedLayer(Layer):
    """A block whose attention and MLP run on `merged` tokens less."""

    merged: int = 0


@dataclass(frozen=True)
class ToMeDense(Reducer):
    """Token merging that every block takes back.

    Bolya et al. 2023, arXiv 2210.09461, as "Expediting Large-Scale Vision Transformer for Dense
    Prediction" (Liang et al. 2022, arXiv 2210.01035) compares it; Bolya & Hoffman 2023, arXiv
    2303.17604, do the same in Stable Diffusion.

    Dense prediction needs a value for every patch. So each block merges twice, what attention is
    computed on and what its MLP is: of the normalised tokens, split in two by turns, the `r` share
    that are most like one of the other half join it as their plain mean. The result is copied to
    all that were merged and added to the tokens, of which all stay. Tokens before the patches never
    merge.
    """

    name: ClassVar[str] = "tome_dense"

    r: float = option(
        0.3, "share of the tokens that merge around attention, and again around the MLP", least=0
    )

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[ToMeDense]:
        """Vary the share, up to half of the tokens; see `Reducer.strengths`."""
        return (cls(r=share / 2) for share in (0, *steps()))

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[ToMeDense]:
        """Try three shares; see `Reducer.candidates`."""
        return (cls(r=share) for share in (0.2, 0.35, 0.5))

    def resolve(self, config: ViTConfig) -> ToMeDense:
        """Check the share; see `Reducer.resolve`."""
        self.check(self.r < 1, "r", "a share of the tokens, below 1")
        return self

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """All tokens stay; see `Reducer.schedule`."""
        tokens = config.num_tokens
        merged = min(int(self.r * tokens), config.num_patches // 2)
        mode = "merge" if merged else "dense"
        return (MergedLayer(tokens, tokens, mode, merged),) * config.depth

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: TokenState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B N C"], TokenState]:
        """Run attention and MLP on merged tokens; see `Reducer.block`."""
        if not isinstance(layer, MergedLayer) or layer.mode == "dense":
            return block(x, state.coordinates), state
        normed = block.ln_1(x)
        matching = match_tokens(normed, r=layer.merged, prefix=state.prefix)
        places = state.coordinates_of_all(x.shape[0])
        places = None if places is None else average_tokens(places, matching)[:, state.prefix :]
        qkv = block.project_qkv(average_tokens(normed, matching), places)
        x = x + unmerge_tokens(block.attend_and_project(*qkv), matching)
        normed = block.ln_2(x)
        matching = match_tokens(normed, r=layer.merged, prefix=state.prefix)
        return x + unmerge_tokens(block.run_mlp(average_tokens(normed, matching)), matching), state

    def groups(
        self, block: Block, x: Float[Array, "B N C"], after: TokenState, layer: Layer, draws: Any
    ) -> Int[Array, "B P"]:
        """Group patches as they merge for attention; see `Reducer.groups`."""
        return self.attended_source(block, x, after, after, layer)

    def attended_source(
        self,
        block: Block,
        x: Float[Array, "B N C"],
        before: TokenState,
        after: TokenState,
        layer: Layer,
    ) -> Int[Array, "B P"]:
        """See `Reducer.attended_source`; a block attends to merged tokens."""
        assert isinstance(layer, MergedLayer)
        matching = match_tokens(block.ln_1(x), r=layer.merged, prefix=before.prefix)
        return matching.places[:, before.prefix :]

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count attention and MLP on what is left, the norms and residuals on all tokens."""
        assert isinstance(layer, MergedLayer)
        tokens, width = layer.tokens_in, config.width
        left = tokens - layer.merged
        total = flops.block(config, left, left)
        if layer.merged:
            odd = tokens // 2
            similarity = (tokens + (tokens - odd) * odd) * width
            total += 2 * (similarity + layer.merged * width) + 10 * layer.merged * width
        return total
