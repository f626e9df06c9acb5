"""Which settings are tried, and what they cost."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest

from hvit_jax import REDUCERS, InputError, ViTConfig, demo
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.flags import parse
from hvit_jax.comparing import CompareConfig
from hvit_jax.comparing.settings import LOWRES, choose_settings
from hvit_jax.costs import cost_share, count_flops
from hvit_jax.evaluation import EvalConfig
from hvit_jax.reducers import ATS, Budgeted, EViT, Reducer
from tests.evaluation_setup import CONFIG

METHODS = [*(name for name in REDUCERS if name != "dense"), "hourglass+evit"]
LEVELS = (0.8, 0.6, 0.4)


@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        read_description(demo.checkpoint_dir()).config,
        CONFIG,
        ViTConfig(8, 8, depth=1, width=8, heads=1, mlp_width=8),
    ],
    ids=["demo", "tiny", "one block"],
)
def test_every_setting_fits_the_model_and_is_written_as_options(config, candidates):
    chosen = choose_settings(config, METHODS, LEVELS, candidates=candidates)
    found = chosen.settings
    assert found[0].method == "dense" and len(set(found)) == len(found)
    tried = {each.method for each in found} | set(chosen.left_out)
    assert tried == {"dense", LOWRES, *METHODS}
    for each in found:
        assert each.reducer.resolve(config) == each.reducer
        words = each.reducer.words()
        read = parse(EvalConfig, words, program="hvit eval", description="").reducer
        assert read.resolve(config) == each.reducer


def test_of_every_method_the_nearest_setting_from_below_is_tried():
    config = read_description(demo.checkpoint_dir()).config
    chosen = choose_settings(config, ["tome"], LEVELS)
    dense = count_flops(config, Reducer())
    for method in ("tome", LOWRES):
        costs = [each.cost(config) / dense for each in chosen.settings if each.method == method]
        assert all(cost <= level for cost, level in zip(costs, LEVELS, strict=True))
    counts = [
        cost_share(config, each.resolve(config)) for each in REDUCERS["tome"].strengths(config)
    ]
    mine = [each.cost(config) / dense for each in chosen.settings if each.method == "tome"]
    assert mine == [max(cost for cost in counts if cost <= level) for level in LEVELS]


def test_both_methods_of_a_chain_leave_the_same_share():
    config = read_description(demo.checkpoint_dir()).config
    chosen = choose_settings(config, ["evit+random"], LEVELS)
    found = [each for each in chosen.settings if each.method == "evit+random"]
    assert len(found) == len(LEVELS) and not chosen.left_out
    for level, each in zip(LEVELS, found, strict=True):
        assert level - 0.03 < each.cost(config) / count_flops(config, Reducer()) <= level
        shares = [
            cost_share(sizes, part)
            for sizes, part in zip(each.reducer.configs(config), each.reducer.parts, strict=True)
        ]
        assert shares[0] == pytest.approx(shares[1], abs=0.06)


def test_lower_resolutions_keep_the_shape():
    config = dataclasses.replace(CONFIG, resolution=(64, 96))  # 8 x 12 patches of 8 pixels.
    chosen = choose_settings(config, [], (0.99, 0.6, 0.2))
    sizes = [each.resolution for each in chosen.settings if each.method == LOWRES]
    assert sizes[0] == (56, 88) and all(abs(width / height - 1.5) < 0.2 for height, width in sizes)
    one = ViTConfig(8, 8, depth=1, width=8, heads=1, mlp_width=8)
    assert choose_settings(one, [], LEVELS).left_out == {LOWRES: "its pictures are one patch"}


def test_what_cannot_be_tried_is_named():
    chosen = choose_settings(CONFIG, ["smyrf", "tome"], (0.4,))
    assert chosen.left_out["tome"] == "not at 0.4 of the dense model's cost: its least is 0.72"
    assert {each.method for each in chosen.settings} == {"dense", LOWRES}


def test_methods_with_budgets_are_tried_with_several():
    found = choose_settings(CONFIG, ["act", "ats", "tome"], LEVELS, candidates=True).settings
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
    found = choose_settings(small_config, ["mine"], (1.0,), candidates=True).settings
    shares = [cost_share(small_config, each.reducer) for each in found if each.method == "mine"]
    assert len(shares) == 5 and min(shares) < 0.6 and max(shares) > 0.8


def test_a_new_method_with_budgets_gets_measured_ones(monkeypatch, small_config):
    @dataclass(frozen=True)
    class Mine(ATS):
        name: ClassVar[str] = "mine"

        @classmethod
        def candidates(cls, config):
            return super(ATS, cls).candidates(config)

    monkeypatch.setitem(REDUCERS, "mine", Mine)
    found = choose_settings(small_config, ["mine"], (1.0,), candidates=True).settings
    mine = [each for each in found if each.method == "mine"]
    assert [each.percentile for each in mine] == [99.0, 75.0, 25.0]
    assert {each.reducer for each in mine} == {Mine().resolve(small_config)}


def test_refuses_unknown_methods():
    with pytest.raises(InputError, match="tomo.*tome"):
        CompareConfig(methods=("tomo",))
