"""What ACT and ATS share: counts that depend on the image, within budgets that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from jaxtyping import Array, Int

from hvit_jax.config import ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.fields import flag
from hvit_jax.models.reducer import Reducer, TokenState

Method = TypeVar("Method", bound="Budgeted")


@dataclass(frozen=True)
class Budgeted(Reducer):
    """Base of the methods whose counts depend on the image.

    Shapes must not, so each block of `budget_blocks` has a budget. The option that `budget_option`
    names sets them: one number for all of these blocks, a list with one for each, or None for as
    many as tokens, which always suffices. `hvit calibrate` measures good ones.
    """

    alone: ClassVar[str] = "its budgets are measured on whole models"
    budget_option: ClassVar[str]

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[Reducer]:
        """Try the method as it is; how much it saves follows from its budgets."""
        return (cls(),)

    def budget_blocks(self, config: ViTConfig) -> tuple[int, ...]:
        """List the blocks that have a budget, in ascending order."""
        raise NotImplementedError

    def counts(self, state: TokenState) -> dict[str, Int[Array, "B S"]]:
        """Count what each image used in the block before, to be held against its budget.

        Args:
            state: the traced state after a block of `budget_blocks`.

        Returns:
            Counts by what was counted, such as "tokens"; one column, or one a head.
        """
        raise NotImplementedError

    def with_budgets(self: Method, budgets: int | tuple[int, ...] | None) -> Method:
        """Replace the budgets."""
        return dataclasses.replace(self, **{self.budget_option: budgets})

    def budgets(self, config: ViTConfig) -> tuple[int, ...]:
        """List the budget of each of `budget_blocks`; more than all tokens are of no use."""
        total, budgets = config.num_tokens, getattr(self, self.budget_option)
        if not isinstance(budgets, tuple):
            one = total if budgets is None else budgets
            budgets = (one,) * len(self.budget_blocks(config))
        return tuple(min(budget, total) for budget in budgets)

    def check_budgets(self, config: ViTConfig, *, least: int = 2) -> None:
        """Refuse budgets below a least one, and a list that is not one for each block.

        Raises:
            InputError: for such budgets.
        """
        budgets, blocks = getattr(self, self.budget_option), len(self.budget_blocks(config))
        listed = budgets if isinstance(budgets, tuple) else (budgets,)
        enough = all(budget is None or budget >= least for budget in listed)
        self.check(enough, self.budget_option, f"at least {least}")
        fits = not isinstance(budgets, tuple) or len(budgets) == blocks
        wanted = f"one number, or one for each of {blocks} blocks"
        self.check(fits, self.budget_option, wanted)


def warn_without_budgets(reducer: Reducer, config: ViTConfig, say: Callable[[str], object]) -> None:
    """Say in one line if a method with budgets has none below all tokens: it saves nothing then.

    Args:
        reducer: any method.
        config: the model's sizes.
        say: is given the line.
    """
    if not isinstance(reducer, Budgeted):
        return
    budgets, total = reducer.budgets(config), config.num_tokens
    if budgets and min(budgets) == total:
        say(
            f"{reducer.name} saves nothing without {flag(reducer.budget_option)}: every block has "
            f"room for all {total} tokens; `hvit calibrate --method {reducer.name}` measures what "
            "it needs"
        )


def as_budgeted(reducer: Reducer) -> Budgeted:
    """Take a method for one with budgets.

    Raises:
        InputError: if it has none.
    """
    if not isinstance(reducer, Budgeted):
        known = " and ".join(sorted(each.name for each in Budgeted.__subclasses__()))
        raise InputError(
            f"{reducer.name} has no budgets: its counts do not depend on the picture "
            f"({known} have budgets)"
        )
    return reducer
