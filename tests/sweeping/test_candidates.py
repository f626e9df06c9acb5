from dataclasses import dataclass
from typing import ClassVar

import pytest

from hvit_jax import REDUCERS, InputError, ViTConfig, demo
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.flags import parse
from hvit_jax.costs import cost_share
from hvit_jax.evaluation import EvalConfig
from hvit_jax.reducers import ATS, Budgeted, EViT
from hvit_jax.sweeping import SweepConfig
from hvit_jax.sweeping.choice import candidates
from tests.evaluation_setup import CONFIG

METHODS = [name for name in REDUCERS if name != "dense"]


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig.vit_b16(),
        ViTConfig.vit_h14(),
        read_description(demo.checkpoint_dir()).config,
        CONFIG,
        ViTConfig(8, 8, depth=1, width=8, heads=1, mlp_width=8),
    ],
    ids=["b16", "h14", "demo", "tiny", "one block"],
)
def test_every_setting_fits_the_model_and_is_written_as_options(config):
    methods = METHODS if config.num_patches > 1 else ["evit", "tome", "smyrf"]
    found = candidates(config, methods)
    assert found[0].reducer.name == "dense" and len(set(found)) == len(found)
    assert {each.reducer.name for each in found} == {"dense", *methods}
    for each in found:
        assert each.reducer.resolve(config) == each.reducer
        words = each.reducer.words()
        read = parse(EvalConfig, words, program="hvit eval", description="").reducer
        assert read.resolve(config) == each.reducer


def test_methods_with_budgets_are_tried_with_several():
    found = candidates(CONFIG, METHODS)
    assert {each.percentile for each in found if each.reducer.name == "ats"} == {99, 75, 25}
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


def test_refuses_unknown_methods():
    with pytest.raises(InputError, match="tomo.*tome"):
        SweepConfig(methods=("tomo",))
