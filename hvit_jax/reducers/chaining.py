"""Chains: one method in the first blocks of a model, another one in those behind them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.fields import hints, known, option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState, pools_patches
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.merging import sum_groups


@dataclass(frozen=True)
class ChainLayer(Layer):
    """A block of one of both methods.

    Attributes:
        part: whose it is: 0 or 1.
        own: its entry in that method's schedule.
        begins: in the second method's first block, the sizes that it works with.
    """

    part: int = 0
    own: Layer = Layer(0, 0)
    begins: ViTConfig | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChainState(TokenState):
    """Trace of the patches through both methods, and the state of each.

    Attributes:
        parts: the first method's state, as it stays behind its blocks; from there on the second's
            too, whose patches are the tokens that it was handed.
        handed: how many patches each of these tokens stands for, where the model will need to know.
    """

    parts: tuple[TokenState, ...] = ()
    handed: Float[Array, "B M"] | None = None

    @classmethod
    def of(cls, *parts: TokenState, handed: Float[Array, "B M"] | None = None) -> ChainState:
        """Join the methods' states: a patch is held by the token that holds its token."""
        first, last = parts[0], parts[-1]
        source, dropped = first.source, first.dropped
        if source is not None and dropped is not None and last is not first:
            assert last.source is not None and last.dropped is not None
            later = gather(last.dropped, jnp.maximum(source - first.prefix, 0))
            dropped = jnp.where((source >= 0)[..., None], later, dropped)
            source = _through(first, last.source)
        return cls(source, dropped, last.coordinates, first.prefix, parts, handed)

    def with_dropped(self, change) -> ChainState:
        """See `TokenState.with_dropped`."""
        changed = super().with_dropped(change)
        parts = tuple(part.with_dropped(change) for part in self.parts)
        return dataclasses.replace(changed, parts=parts)


@dataclass(frozen=True)
class Chain(Reducer):
    """Base of the chains of two methods; `chain` and names such as "hourglass+evit" make them.

    Each method works as on a model of its own: the first on one that ends before block `chain_at`,
    the second on one that begins there, whose patches are the tokens that the first has left, in a
    single row. A chain's options are those of both methods. One that both have is written with
    `first_` or `second_` before its name.
    """

    # The methods, and for each what its options are called here.
    kinds: ClassVar[tuple[type[Reducer], ...]]
    names: ClassVar[tuple[dict[str, str], ...]]

    chain_at: int | None = option(
        None,
        "first block of the second method; its options count blocks from there (default: half the "
        "depth)",
    )

    @classmethod
    def of(cls, first: Reducer, second: Reducer, at: int | None) -> Chain:
        """Make the chain of two methods; see `chain`."""
        options = {
            own: getattr(part, theirs)
            for part, names in zip((first, second), cls.names, strict=True)
            for theirs, own in names.items()
        }
        return cls(chain_at=at, **options)

    @functools.cached_property
    def parts(self) -> tuple[Reducer, ...]:
        """The two methods."""
        return tuple(
            kind(**{theirs: getattr(self, own) for theirs, own in names.items()})
            for kind, names in zip(self.kinds, self.names, strict=True)
        )

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[Chain]:
        """Let both methods leave the same share of what their blocks cost dense.

        See `Reducer.strengths`.
        """
        return cls._leaving(steps(), config)

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[Chain]:
        """Try five such shares; see `Reducer.candidates`."""
        return cls._leaving((0.5, 0.6, 0.7, 0.8, 0.9), config)

    @classmethod
    def _leaving(cls, shares: Iterable[float], config: ViTConfig) -> Iterable[Chain]:
        at = known(cls().resolve(config).chain_at)
        before = _before(config, at)
        for share in shares:
            first = _at_share(cls.kinds[0], before, share)
            yield cls.of(first, _at_share(cls.kinds[1], _behind(config, at, first), share), at)

    def resolve(self, config: ViTConfig) -> Chain:
        """Fill in the options of both methods; see `Reducer.resolve`."""
        at = config.depth // 2 if self.chain_at is None else self.chain_at
        last = config.depth - 1
        wanted = f"from 1 to {last}, the model's last block" if last else "the model has one block"
        self.check(0 < at <= last, "chain_at", wanted)
        first, second = self.parts
        first = self._resolved(first, _before(config, at), f"before block {at}")
        behind = _behind(config, at, first)
        second = self._resolved(second, behind, f"from block {at} on, counted as 0")
        return self.of(first, second, at)

    def _resolved(self, method: Reducer, config: ViTConfig, where: str) -> Reducer:
        try:
            return method.resolve(config)
        except InputError as error:
            raise InputError(f"{self.name}, {where}: {error}") from error

    def configs(self, config: ViTConfig) -> tuple[ViTConfig, ViTConfig]:
        """Give the sizes of the two models that the methods work on."""
        at = known(self.chain_at)
        return _before(config, at), _behind(config, at, self.parts[0])

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """List the first method's blocks, then the second's; see `Reducer.schedule`."""
        layers = []
        for part, sizes in enumerate(self.configs(config)):
            for block, own in enumerate(self.parts[part].schedule(sizes)):
                begins = sizes if part and not block else None
                tokens = own.tokens_in, own.tokens_out
                layers.append(ChainLayer(*tokens, own.mode, part, own, begins))
        return tuple(layers)

    def draws(self, config: ViTConfig) -> tuple[Any, ...]:
        """Make the random numbers of both methods; see `Reducer.draws`."""
        both = zip(self.parts, self.configs(config), strict=True)
        return tuple(draws for part, sizes in both for draws in part.draws(sizes))

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> ChainState:
        """Make the first method's state; see `Reducer.init`."""
        return ChainState.of(self.parts[0].init(x, self.configs(config)[0], trace=trace))

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: ChainState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], ChainState]:
        """Run one block as the method does that it belongs to."""
        assert isinstance(layer, ChainLayer)
        state = self._entering(x, state, layer)
        part = self.parts[layer.part]
        x, after = part.block(block, x, state.parts[layer.part], layer.own, draws)
        return x, ChainState.of(*state.parts[: layer.part], after, handed=state.handed)

    def _entering(self, x, state: ChainState, layer: ChainLayer) -> ChainState:
        """Give the state in which a block begins; the second method's first one makes its own."""
        if layer.begins is None:
            return state
        (first,), handed = state.parts, None
        if pools_patches(layer.begins):
            handed = self.parts[0].patch_sizes(x, first)
        trace = first.source is not None or handed is not None
        second = self.parts[1].init(x, layer.begins, trace=trace)
        if first.coordinates is not None and second.coordinates is not None:
            rows = max(len(first.coordinates), len(second.coordinates))
            shape = (rows, *first.coordinates.shape[1:])
            coordinates = jnp.broadcast_to(first.coordinates, shape)
            second = dataclasses.replace(second, coordinates=coordinates)
        return ChainState.of(first, second, handed=handed)

    def restore(self, tokens: Float[Array, "B N C"], state: ChainState) -> Float[Array, "B P C"]:
        """Put tokens back where the second method had them, then where the first had these."""
        if len(state.parts) == 2:
            handed = self.parts[1].restore(tokens, state.parts[1])
            tokens = jnp.concatenate([tokens[:, : state.prefix], handed], axis=1)
        return self.parts[0].restore(tokens, state.parts[0])

    def patch_sizes(
        self, x: Float[Array, "B N C"], state: ChainState
    ) -> Float[Array, "B M"] | None:
        """Count a token as often as the tokens that it holds counted when they were handed over."""
        second = state.parts[1]
        if state.handed is None or second.source is None:
            return self.parts[1].patch_sizes(x, second)
        left = x.shape[1] - state.prefix
        return sum_groups(state.handed, second.source - state.prefix, tokens=left)

    def groups(
        self, block: Block, x: Float[Array, "B N C"], after: ChainState, layer: Layer, draws: Any
    ) -> Int[Array, "B P"]:
        """See `Reducer.groups`."""
        assert isinstance(layer, ChainLayer)
        part, state = self.parts[layer.part], after.parts[layer.part]
        groups = part.groups(block, x, state, layer.own, draws)
        return groups if layer.part == 0 else _through(after.parts[0], groups)

    def attended_source(
        self,
        block: Block,
        x: Float[Array, "B N C"],
        before: ChainState,
        after: ChainState,
        layer: Layer,
    ) -> Int[Array, "B P"] | None:
        """See `Reducer.attended_source`."""
        assert isinstance(layer, ChainLayer)
        entering = self._entering(x, before, layer).parts[layer.part]
        leaving, part = after.parts[layer.part], self.parts[layer.part]
        source = part.attended_source(block, x, entering, leaving, layer.own)
        return source if layer.part == 0 or source is None else _through(after.parts[0], source)

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count a block as its method does."""
        assert isinstance(layer, ChainLayer)
        sizes = self.configs(config)[layer.part]
        return self.parts[layer.part].block_flops(sizes, layer.own)

    def restore_flops(self, config: ViTConfig, channels: int) -> int:
        """Count what both methods take to restore; see `Reducer.restore_flops`."""
        both = zip(self.parts, self.configs(config), strict=True)
        return sum(part.restore_flops(sizes, channels) for part, sizes in both)

    def encoder_dropout_flops(self, config: ViTConfig) -> int:
        """Count it as the first method does."""
        return self.parts[0].encoder_dropout_flops(self.configs(config)[0])


def chain(first: Reducer, second: Reducer, at: int | None = None) -> Chain:
    """Run one method in the first blocks of a model, and another in those behind them.

    Each works as on a model of its own; see docs/methods/chain.md.

    Args:
        first: the method of the first blocks.
        second: the method of the others, whose options count blocks from `at`.
        at: the first block of the second method; None: half the depth.

    Raises:
        InputError: for a method that cannot stand there.
    """
    return chain_class(type(first), type(second)).of(first, second, at)


@functools.cache
def chain_class(first: type[Reducer], second: type[Reducer]) -> type[Chain]:
    """Make the class of the chains of two methods, whose fields are the options of both.

    Raises:
        InputError: for a method that cannot stand there.
    """
    for kind in (first, second):
        if kind.alone:
            raise InputError(f"{kind.name} cannot be chained: {kind.alone}")
    if second.needs_grid:
        raise InputError(
            f"{second.name} cannot be the second method of a chain: it needs the grid of patches"
        )
    names = [{field.name for field in dataclasses.fields(kind)} for kind in (first, second)]
    shared, declared, own = names[0] & names[1], [], []
    for place, kind in (("first", first), ("second", second)):
        own.append({})
        for field in dataclasses.fields(kind):
            name = f"{place}_{field.name}" if field.name in shared else field.name
            metadata = {**field.metadata, "help": f"{kind.name}: {field.metadata['help']}"}
            if field.name in shared:
                metadata["short"] = None
            copied = dataclasses.field(default=field.default, metadata=metadata)
            declared.append((name, hints(kind)[field.name], copied))
            own[-1][field.name] = name
    about = f"{first.name} in the first blocks, {second.name} in the others; see `Chain`."
    name = f"{first.name}+{second.name}"
    values = {"name": name, "kinds": (first, second), "names": tuple(own), "__doc__": about}
    title = first.__name__ + second.__name__
    return dataclasses.make_dataclass(
        title, declared, bases=(Chain,), namespace=values, frozen=True
    )


def _before(config: ViTConfig, at: int) -> ViTConfig:
    return dataclasses.replace(config, depth=at, decoder=_without_taps(config))


def _behind(config: ViTConfig, at: int, first: Reducer) -> ViTConfig:
    """Describe the model behind a block: its patches are the tokens that are left, in one row."""
    layers = first.schedule(_before(config, at))
    patches = layers[-1].tokens_out - config.prefix_tokens
    return dataclasses.replace(
        config,
        depth=config.depth - at,
        resolution=(config.patch_size, patches * config.patch_size),
        decoder=_without_taps(config),
    )


def _at_share(method: type[Reducer], config: ViTConfig, share: float) -> Reducer:
    """Find the strength at which blocks cost what is nearest to a share of what they cost dense."""
    wanted = share * _of_blocks(Reducer(), config)
    costs = _costs(method, config)
    return min(costs, key=lambda each: abs(costs[each] - wanted))


@functools.lru_cache(2)  # Of both methods: shares often leave the second one as many tokens.
def _costs(method: type[Reducer], config: ViTConfig) -> dict[Reducer, int]:
    """List what a model's blocks cost at every strength of a method."""
    resolved = (each.resolve(config) for each in method.strengths(config))
    return {each: _of_blocks(each, config) for each in resolved}


def _of_blocks(method: Reducer, config: ViTConfig) -> int:
    return sum(method.block_flops(config, layer) for layer in method.schedule(config))


def _without_taps(config: ViTConfig):
    return config.decoder and dataclasses.replace(config.decoder, taps=())


def _through(first: TokenState, found: Int[Array, "B M"]) -> Int[Array, "B P"]:
    """Give each patch what was found for the token that held it behind the first method.

    It is -1 for patches that this one dropped.
    """
    assert first.source is not None
    held = gather(found, jnp.maximum(first.source - first.prefix, 0))
    return jnp.where(first.source < 0, -1, held)
