"""Settings: which are tried, and what each costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hvit_jax.config import ViTConfig
from hvit_jax.costs import at_cost, count_flops
from hvit_jax.errors import InputError
from hvit_jax.models.reducer import Reducer
from hvit_jax.reducers import Budgeted, method_class, method_name

LOWRES = "lowres"  # The dense model at a lower resolution, as a method is named.
# Shares of pictures, in per cent, that budgets should suffice for.
_PERCENTILES = (99.0, 75.0, 25.0)
# Shares of the dense model's cost, for methods without candidates of their own.
_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Setting:
    """One setting to try.

    Attributes:
        reducer: the method, resolved; one whose budgets are to be measured comes without them.
        percentile: the share of pictures that these should suffice for; None: budgets are given, or
            the method has none.
        resolution: of `lowres`; None: the model's own.
    """

    reducer: Reducer
    percentile: float | None = None
    resolution: tuple[int, int] | None = None

    @property
    def method(self) -> str:
        """What the setting is a setting of."""
        return self.reducer.name if self.resolution is None else LOWRES

    @property
    def tried(self) -> dict[str, Any]:
        """The setting as files have it, whatever budgets come of it."""
        return {"args": self.reducer.options(), "percentile": self.percentile}

    def sizes(self, config: ViTConfig) -> ViTConfig:
        """Give the model's sizes under this setting."""
        if self.resolution is None:
            return config
        return dataclasses.replace(config, resolution=self.resolution)

    def cost(self, config: ViTConfig) -> int:
        """Count the multiply-adds of an image; budgets that are to be measured count as full."""
        return count_flops(self.sizes(config), self.reducer)


def name_of(method: str, args: dict[str, Any], size: str) -> str:
    """Name a setting with its main options."""
    return f"{method} {size}" if method == LOWRES else method_name(method, args)


@dataclass(frozen=True)
class Chosen:
    """What is tried, the dense model first, and what is not."""

    settings: tuple[Setting, ...]
    left_out: dict[str, str]  # What is not tried, and why, by method.


def choose_settings(
    config: ViTConfig,
    methods: Iterable[str],
    levels: Sequence[float],
    *,
    candidates: bool = False,
) -> Chosen:
    """List the dense model, and what is tried of every method and of lower resolutions.

    Args:
        config: the model's sizes.
        methods: names in `hvit_jax.REDUCERS`, or two with + between for the chain of both.
        levels: shares of the dense model's cost; of each method's `strengths` the one nearest from
            below to each is tried.
        candidates: try the methods' own `candidates` in place of these.
    """
    found, left_out = [Setting(Reducer().resolve(config))], {}
    for method in (LOWRES, *methods):
        try:
            if candidates and method != LOWRES:
                tried = [each for each in _candidates(config, method) if _saves(each, config)]
                why = "" if tried else "it costs no less than the dense model"
            else:
                tried, why = _nearest(_strengths(config, method), config, levels)
        except InputError as error:
            tried, why = [], str(error)
        found += tried
        if why:
            left_out[method] = why
    # On a small model several settings come to the same.
    return Chosen(tuple(dict.fromkeys(found)), left_out)


def _strengths(config: ViTConfig, method: str) -> list[Setting]:
    if method == LOWRES:
        return _lower_resolutions(config)
    return [Setting(each.resolve(config)) for each in method_class(method).strengths(config)]


def _nearest(
    settings: Sequence[Setting], config: ViTConfig, levels: Sequence[float]
) -> tuple[list[Setting], str]:
    """Find for every level the setting of the highest cost that is not above it.

    Returns:
        The settings, and for which levels there is none.
    """
    dense = count_flops(config, Reducer())
    costs = [(each.cost(config) / dense, each) for each in settings]
    found, missing = [], []
    for level in sorted(levels, reverse=True):
        below = [(cost, each) for cost, each in costs if cost <= level]
        if below:
            found.append(max(below, key=lambda pair: pair[0])[1])
        else:
            missing.append(f"{level:g}")
    least = min(cost for cost, _ in costs)
    why = f"not at {', '.join(missing)} of the dense model's cost: its least is {least:.2f}"
    return found, why if missing else ""


def _saves(setting: Setting, config: ViTConfig) -> bool:
    """Tell whether a setting costs less than dense; what is measured later may."""
    dense = count_flops(config, Reducer())
    return setting.percentile is not None or setting.cost(config) < dense


def _lower_resolutions(config: ViTConfig) -> list[Setting]:
    """List the dense model at all lower resolutions, of about the same shape.

    Raises:
        InputError: if there are none.
    """
    (height, width), longer = config.grid, max(config.grid)
    if longer == 1:
        raise InputError("its pictures are one patch")
    grids = {
        (max(1, round(side * height / longer)), max(1, round(side * width / longer)))
        for side in range(1, longer)
    }
    dense, patch = Reducer().resolve(config), config.patch_size
    found = [Setting(dense, resolution=(rows * patch, columns * patch)) for rows, columns in grids]
    for each in found:
        each.sizes(config)  # Refused where a model's resolution is part of its sizes.
    return found


def _candidates(config: ViTConfig, method: str) -> list[Setting]:
    """List what a method proposes; budgets are measured, except for models that make maps."""
    kind = method_class(method)
    budgeted = issubclass(kind, Budgeted)
    if budgeted and config.decoder is None:
        free = [each.resolve(config) for each in kind.candidates(config)]
        return [Setting(each, percentile) for each in free for percentile in _PERCENTILES]
    settings = [] if budgeted else [each.resolve(config) for each in kind.candidates(config)]
    return [
        Setting(each) for each in settings or (at_cost(method, config, share) for share in _SHARES)
    ]
