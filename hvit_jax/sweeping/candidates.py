"""Which settings are tried: a few of every method, for a model of some size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hvit_jax.config import ViTConfig
from hvit_jax.costs import at_cost
from hvit_jax.models.reducer import Reducer
from hvit_jax.reducers import REDUCERS, Budgeted

# Shares of pictures, in per cent, that budgets should suffice for.
_PERCENTILES = (99.0, 75.0, 25.0)
# Shares of the dense model's cost, for methods without candidates of their own.
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
    """List the dense model, and for every other method what is worth trying on such a model."""
    found = [Candidate(Reducer().resolve(config))]
    for method in methods:
        settings = [each.resolve(config) for each in REDUCERS[method].candidates(config)]
        for reducer in settings or [at_cost(method, config, share) for share in _SHARES]:
            budgets = _PERCENTILES if isinstance(reducer, Budgeted) else (None,)
            found += [Candidate(reducer, percentile) for percentile in budgets]
    # On a small model several settings come to the same.
    return list(dict.fromkeys(found))
