"""Which settings are tried: a few of every method, derived from the model's size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hvit_jax.config import ViTConfig
from hvit_jax.costs import at_cost
from hvit_jax.errors import InputError, unknown
from hvit_jax.reducers import REDUCERS, Reducer, make_reducer

DENSE = "dense"
# Shares of pictures, in per cent, that budgets should suffice for.
_PERCENTILES = (99.0, 75.0, 25.0)
# Shares of the dense model's cost, for methods without a grid of their own.
_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Candidate:
    """One setting to try.

    Attributes:
        reducer: the method, resolved; one with budgets comes without them.
        percentile: the share of pictures that its budgets should suffice for, once they are
            measured; None for a method without budgets.
    """

    reducer: Reducer
    percentile: float | None = None

    @property
    def tried(self) -> dict[str, Any]:
        """The candidate's options and percentile, as files have them."""
        return {"args": self.reducer.options(), "percentile": self.percentile}


def candidates(config: ViTConfig, methods: Iterable[str]) -> list[Candidate]:
    """List the dense model, and for every method what is worth trying on a model of this size.

    Args:
        config: the model's sizes.
        methods: names of methods.

    Raises:
        InputError: for an unknown method, or the dense model, which is listed anyway.
    """
    known = [name for name in REDUCERS if name != DENSE]
    found = [Candidate(make_reducer(DENSE).resolve(config))]
    for method in methods:
        if method == DENSE:
            raise InputError("--methods names what to try beside dense, which is always tried")
        if method not in known:
            raise unknown("method", method, known)
        for reducer in _settings(method, config):
            budgets = _PERCENTILES if reducer.budget_option else (None,)
            found += [Candidate(reducer, percentile) for percentile in budgets]
    # On a small model several settings come to the same.
    return list(dict.fromkeys(found))


def _settings(method: str, config: ViTConfig) -> list[Reducer]:
    """List settings of a method: its grid, or what it has near some costs, or one to budget."""
    grid = _GRIDS[method](config) if method in _GRIDS else [{}]
    if method in _GRIDS or REDUCERS[method].budget_option:
        return [make_reducer(method, **each).resolve(config) for each in grid]
    return list(dict.fromkeys(at_cost(method, config, share) for share in _SHARES))


def _parts(config: ViTConfig, *parts: float) -> list[int]:
    """Find blocks at parts of the depth, from block 1 on, each once."""
    last = config.depth - 1
    return sorted({min(last, max(min(1, last), round(config.depth * part))) for part in parts})


def _hourglass(config: ViTConfig) -> list[dict[str, Any]]:
    grids = [tuple(max(1, round(side * part)) for side in config.grid) for part in (0.5, 0.65, 0.8)]
    return _product(cluster_location=_parts(config, 1 / 6, 1 / 3, 1 / 2), num_clusters=grids)


def _evit(config: ViTConfig) -> list[dict[str, Any]]:
    return _product(keep_rate=(0.5, 0.6, 0.7, 0.8, 0.9))


def _evo(config: ViTConfig) -> list[dict[str, Any]]:
    # Block 0 gives the first scores, so that a model of one block leaves nothing to try.
    places = _parts(config, 1 / 3, 1 / 2) if config.depth > 1 else []
    least = 1 / config.num_patches
    ratios = sorted({max(least, ratio) for ratio in (0.35, 0.5, 0.65)})
    return _product(prune_location=places, prune_ratio=ratios)


def _tome(config: ViTConfig) -> list[dict[str, Any]]:
    a_block = config.num_patches / config.depth
    counts = [max(1, round(part * a_block)) for part in (0.25, 0.4, 0.55, 0.7, 0.85)]
    return _product(r=counts)


def _ats(config: ViTConfig) -> list[dict[str, Any]]:
    starts = _parts(config, 1 / 4, 1 / 2, 3 / 4)
    return [{"blocks": tuple(range(start, config.depth))} for start in starts]


def _act(config: ViTConfig) -> list[dict[str, Any]]:
    return _product(q_hashes=(16, 24))


def _smyrf(config: ViTConfig) -> list[dict[str, Any]]:
    size = min(32, config.num_patches + 1)
    return [
        {**each, "k_cluster_size": size, "q_cluster_size": size}
        for each in _product(rounds=(4, 16))
    ]


def _product(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    names = list(choices)
    return [
        dict(zip(names, values, strict=True)) for values in itertools.product(*choices.values())
    ]


_GRIDS: dict[str, Callable[[ViTConfig], list[dict[str, Any]]]] = {
    "hourglass": _hourglass,
    "evit": _evit,
    "evo": _evo,
    "act": _act,
    "ats": _ats,
    "tome": _tome,
    "smyrf": _smyrf,
}
