"""What a reduction method is: a schedule, a state, and how one block runs."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, as_json, option
from hvit_jax.ops import flops
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.rotary import grid_coordinates

if typing.TYPE_CHECKING:
    from hvit_jax.models.block import Block


State = TypeVar("State", bound="TokenState")
Method = TypeVar("Method", bound="Reducer")


@dataclass(frozen=True)
class Layer:
    """What one block does to the token count; static, so that equal layers can share a program.

    Attributes:
        tokens_in: tokens that enter the block, the prefix included.
        tokens_out: tokens that leave it, the prefix included.
        mode: how the method runs the block; "dense" means without reduction.
    """

    tokens_in: int
    tokens_out: int
    mode: str = "dense"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenState:
    """What each token stands for; methods extend it with what they carry between blocks.

    The first two fields are None when the caller did not ask for tracing.

    Attributes:
        source: for every input patch the index of the token that now holds it, -1 if it was
            dropped.
        dropped: for every dropped patch the last value of its token, zeros for the others.
        coordinates: y and x of every patch token, of a model with rotary positions; its first axis
            is 1 as long as they are the same for all images. None without them.
        prefix: tokens before the patches, K; no method touches them.
    """

    source: Int[Array, "B P"] | None
    dropped: Float[Array, "B P C"] | None
    coordinates: Float[Array, "b _ 2"] | None
    prefix: int = dataclasses.field(metadata={"static": True})

    def moved(self: State, x: Float[Array, "B N C"], places: Int[Array, "B N"]) -> State:
        """Follow tokens to their new places; without tracing, do nothing.

        Args:
            x: the tokens before they move.
            places: the new index of every token, -1 for one that is dropped.
        """
        if self.source is None or self.dropped is None:
            return self
        here = jnp.maximum(self.source, 0)
        new = jnp.where(self.source < 0, -1, gather(places, here))
        lost = (self.source >= 0) & (new < 0)
        dropped = jnp.where(lost[..., None], gather(x, here), self.dropped)
        return dataclasses.replace(self, source=new, dropped=dropped)

    def with_dropped(self: State, change: Callable[[Array], Array]) -> State:
        """Change the last values of dropped patches, such as to normalise them."""
        if self.dropped is None:
            return self
        return dataclasses.replace(self, dropped=change(self.dropped))

    def coordinates_of(self, patches: Int[Array, "B M"]) -> Float[Array, "B M 2"] | None:
        """Gather the coordinates of patch tokens, counted from 0 behind the prefix."""
        if self.coordinates is None:
            return None
        shape = (patches.shape[0], *self.coordinates.shape[1:])
        return gather(jnp.broadcast_to(self.coordinates, shape), patches)

    def coordinates_of_all(self, batch: Any) -> Float[Array, "B N 2"] | None:
        """Give the coordinates of all tokens of so many images, and zeros to the prefix."""
        if self.coordinates is None:
            return None
        padded = jnp.pad(self.coordinates, ((0, 0), (self.prefix, 0), (0, 0)))
        return jnp.broadcast_to(padded, (batch, *padded.shape[1:]))


@dataclass(frozen=True)
class Reducer(Options):
    """Base of every method; used as it is, it is the dense model.

    A method is a frozen dataclass whose fields are its options (`option`), whose docstring explains
    it, and which overrides `resolve`, `schedule`, `init`, `block` and `block_flops` as needed.
    `hvit_jax.reducers.budgeted` has the base of those whose counts depend on the image.
    """

    name: ClassVar[str] = "dense"
    # Whether `restore` can spread a decoder's masks, of which it knows no earlier values.
    restores_masks: ClassVar[bool] = False
    # Of chains (`hvit_jax.chain`): why there are none with it, and whether the patches that it
    # works on must be a grid.
    alone: ClassVar[str] = ""
    needs_grid: ClassVar[bool] = False
    # Whether other methods should be better than this one.
    baseline: ClassVar[bool] = False

    @classmethod
    def label(cls, name: str) -> str:
        """Name an option in messages, behind the method that it belongs to."""
        return f"{cls.name}: {name}"

    def words(self) -> list[str]:
        """See `Options.words`; the method's name comes first."""
        return ["--method", self.name, *super().words()]

    def check(self, accepted: bool, field: str, wanted: str) -> None:
        """Raise InputError that names the option, its value and what would be right."""
        if not accepted:
            raise InputError(f"{self.name}: {field}={getattr(self, field)!r}: {wanted}")

    def check_blocks(self, field: str, config: ViTConfig) -> None:
        """Raise InputError unless an option lists blocks of the model, each once."""
        blocks, last = getattr(self, field), config.depth - 1
        inside = all(0 <= block <= last for block in blocks)
        self.check(inside, field, f"the model's blocks are 0 to {last}")
        self.check(len(set(blocks)) == len(blocks), field, "every block may appear only once")

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[Reducer]:
        """List settings of the method that differ in how much they save, in any order.

        One option varies, the method's strength, within what is of use; the others keep their
        defaults or what suits the comparison of methods. A method without such an option has one.
        """
        return (cls(),)

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[Reducer]:
        """List the few settings that `hvit compare --candidates` tries, not yet resolved.

        Those of a method with budgets come without them, which are measured. Where there are none
        at all, those of `strengths` are tried that come near several shares of the dense cost.
        """
        return ()

    def resolve(self: Method, config: ViTConfig) -> Method:
        """Replace defaults that depend on the model's size, and check all options against it.

        Raises:
            InputError: for options that this model cannot run.
        """
        return self

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Tell, block by block, how many tokens enter and leave; called on a resolved method."""
        return (Layer(config.num_tokens, config.num_tokens),) * config.depth

    def draws(self, config: ViTConfig) -> tuple[Any, ...]:
        """Make each block's fixed random numbers (a pytree, or None); all methods but two: None."""
        return (None,) * config.depth

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> TokenState:
        """Make the state before the first block.

        Args:
            x: the tokens that enter the first block.
            config: the model's sizes.
            trace: whether to follow which token holds which patch.
        """
        return TokenState(**initial_state(x, config, trace=trace))

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: TokenState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run one block.

        Args:
            block: the block's parameters, and the parts that it is made of.
            x: tokens, the prefix first.
            state: the method's state before the block.
            layer: the block's entry in the schedule.
            draws: the block's random numbers.

        Returns:
            Tokens and state after the block.
        """
        return block(x, state.coordinates), state

    def restore(self, tokens: Float[Array, "B N C"], state: TokenState) -> Float[Array, "B P C"]:
        """Put processed tokens back on the full grid of patches.

        A patch takes the token that holds it, or the last value that it had before it was dropped.

        Args:
            tokens: tokens after a block, the prefix first.
            state: the traced state after the same block.

        Raises:
            InputError: if the state is not traced.
        """
        if state.source is None or state.dropped is None:
            raise InputError("restore needs a traced state, as model.features returns it")
        held = gather(tokens, jnp.maximum(state.source, 0))
        return jnp.where((state.source >= 0)[..., None], held, state.dropped)

    def patch_sizes(
        self, x: Float[Array, "B N C"], state: TokenState
    ) -> Float[Array, "B M"] | None:
        """Tell how often each patch token counts where the model pools them; None: once each.

        Args:
            x: tokens after the last block, the prefix first.
            state: the state after it.
        """
        return None

    def spreads_masks(self, config: ViTConfig) -> bool:
        """Tell whether a decoder runs on the tokens that are left, and `restore` gets its masks."""
        decoder = config.decoder
        if decoder is None or decoder.taps:
            return False
        return self.restores_masks and decoder.restore in (None, "masks")

    def report(self, state: TokenState) -> dict[str, Float[Array, " B"]]:
        """Count, for every image, what a user should hear of, such as budgets that overflowed."""
        return {}

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count one block in the tables' convention: multiply-adds for one image.

        Attention is counted on the tokens that enter and the MLP on those that leave.
        """
        return flops.block(config, layer.tokens_in, layer.tokens_out)

    def restore_flops(self, config: ViTConfig, channels: int) -> int:
        """Count `restore` of so many channels a token; where it only gathers, nothing."""
        return 0

    def encoder_dropout_flops(self, config: ViTConfig) -> int:
        """Count the dropout after the position embedding, which the tables include."""
        return config.num_tokens * config.width

    def groups(
        self, block: Block, x: Float[Array, "B N C"], after: TokenState, layer: Layer, draws: Any
    ) -> Int[Array, "B P"]:
        """Give each patch the number of its group; a block treats the patches of a group alike.

        A group is what one token holds after the block, unless a method says otherwise.

        Args:
            block: as for `block`.
            x: tokens before the block.
            after: the traced state after it.
            layer: the block's entry in the schedule.
            draws: the block's random numbers.

        Returns:
            Every patch's group; -1 for patches that are dropped, or left out by this block.
        """
        assert after.source is not None, "pictures are made of traced states"
        return after.source

    def attended_source(
        self,
        block: Block,
        x: Float[Array, "B N C"],
        before: TokenState,
        after: TokenState,
        layer: Layer,
    ) -> Int[Array, "B P"] | None:
        """Tell for every patch which token holds it when a block attends, -1 if none does.

        Args:
            block: as for `block`.
            x: tokens before the block.
            before: the traced state before it.
            after: the one after it.
            layer: the block's entry in the schedule.
        """
        return before.source

    def options(self) -> dict[str, Any]:
        """List the options and their values, as JSON can hold them."""
        return as_json(self)


def pool_by_size() -> Any:
    """Declare the option of the methods whose tokens may stand for several patches."""
    return option(
        True,
        "where the model pools its patches, count a token as often as it has patches",
    )


def pools_patches(config: ViTConfig) -> bool:
    """Tell whether the model pools its patches; others read tokens of the prefix alone."""
    return config.pool in ("avg", "cls+avg", "map")


def initial_state(
    x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool, by_image: bool = False
) -> dict[str, Any]:
    """Make `TokenState`'s fields before the first block: patch `i` is token `K + i`.

    Args:
        x: the tokens that enter the first block.
        config: the model's sizes.
        trace: whether to trace; without it `source` and `dropped` are None.
        by_image: whether each image has coordinates of its own from the start, for methods by which
            they come to differ in blocks that keep the token count.
    """
    prefix, batch = config.prefix_tokens, x.shape[0]
    places = jnp.arange(prefix, x.shape[1], dtype=jnp.int32)
    coordinates = None
    if config.rope is not None:
        coordinates = jnp.asarray(grid_coordinates(config.rope, config.grid))[None]
        coordinates = jnp.repeat(coordinates, batch if by_image else 1, axis=0)
    return {
        "source": jnp.broadcast_to(places, (batch, places.size)) if trace else None,
        "dropped": jnp.zeros_like(x[:, prefix:]) if trace else None,
        "coordinates": coordinates,
        "prefix": prefix,
    }
