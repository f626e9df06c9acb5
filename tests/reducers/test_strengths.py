import pytest

import hvit_jax
from hvit_jax import InputError, ViTConfig, count_flops
from hvit_jax.costs import at_cost, cost_share

METHODS = sorted(hvit_jax.REDUCERS)
REDUCING = (
    *("hourglass", "evit", "tome", "evo", "ats"),
    *("pitome", "tofu", "diffrate", "atc", "mctf", "random", "pool"),
)


@pytest.mark.parametrize("method", METHODS)
def test_strengths_run_on_small_and_large_models(method, small_config):
    for config in (small_config, ViTConfig.vit_b16(), ViTConfig.vit_h14()):
        settings = [each.resolve(config) for each in hvit_jax.REDUCERS[method].strengths(config)]
        assert {each.name for each in settings} == {method}
        shares = [cost_share(config, each) for each in settings]
        assert min(shares) < 1 or method == "dense" or config is small_config


@pytest.mark.parametrize("method", REDUCING)
@pytest.mark.parametrize("share", [0.5, 0.8, pytest.param(0.6, marks=pytest.mark.slow)])
def test_finds_the_cost_that_is_asked_for(method, share):
    config = ViTConfig.vit_l16()
    found = at_cost(method, config, share)
    dense = count_flops(config, hvit_jax.make_reducer("dense"))
    assert count_flops(config, found) / dense == pytest.approx(share, abs=0.035)


def test_dense_is_all_that_dense_can_be(small_config):
    assert cost_share(small_config, at_cost("dense", small_config, 0.5)) == 1


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_refuses_shares_out_of_range(small_config, share):
    with pytest.raises(InputError, match="above 0 and at most 1"):
        at_cost("tome", small_config, share)


def test_refuses_unknown_methods(small_config):
    with pytest.raises(InputError, match="tomo.*tome"):
        at_cost("tomo", small_config, 0.5)
