from dataclasses import dataclass
from typing import ClassVar

import pytest

from hvit_jax import REDUCERS, InputError, ViTConfig
from hvit_jax.costs import cost_share
from hvit_jax.reducers import ATS, Budgeted, EViT
from hvit_jax.sweeping.grid import candidates


@pytest.mark.parametrize("config", [ViTConfig.vit_b16(), ViTConfig.vit_h14()])
def test_every_method_is_tried(config):
    found = candidates(config, [name for name in REDUCERS if name != "dense"])
    assert {each.reducer.name for each in found} == set(REDUCERS)
    assert found[0].reducer.name == "dense" and len(set(found)) == len(found)
    assert all((each.percentile is None) != isinstance(each.reducer, Budgeted) for each in found)


def test_a_method_without_candidates_is_tried_at_several_costs(monkeypatch, small_config):
    @dataclass(frozen=True)
    class Mine(EViT):
        name: ClassVar[str] = "mine"

        @classmethod
        def candidates(cls, config):
            return ()

    monkeypatch.setitem(REDUCERS, "mine", Mine)
    dense, *mine = candidates(small_config, ["mine"])
    shares = [cost_share(small_config, each.reducer) for each in mine]
    assert len(mine) == 5 and min(shares) < 0.6 and max(shares) > 0.8


def test_a_new_method_with_budgets_gets_measured_ones(monkeypatch, small_config):
    @dataclass(frozen=True)
    class Mine(ATS):
        name: ClassVar[str] = "mine"

        @classmethod
        def candidates(cls, config):
            return super(ATS, cls).candidates(config)

    monkeypatch.setitem(REDUCERS, "mine", Mine)
    _, *mine = candidates(small_config, ["mine"])
    assert [each.percentile for each in mine] == [99.0, 75.0, 25.0]
    assert {each.reducer for each in mine} == {Mine().resolve(small_config)}


def test_refuses_unknown_methods(small_config):
    with pytest.raises(InputError, match="tomo.*tome"):
        candidates(small_config, ["tomo"])
