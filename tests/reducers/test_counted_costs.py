"""Token counts and multiply-adds of the methods on SWAG's models, as their formulas give them."""

import dataclasses
import json
from pathlib import Path

import pytest

import hvit_jax
from hvit_jax.architectures import named_config

FILE = Path(__file__).parents[1] / "goldens" / "methods" / "flops_check.json"


def name(row):
    options = (f"{key}={value}" for key, value in row["args"].items() if len(str(value)) < 30)
    return "-".join([row["model"], row["method"], *options])


@pytest.mark.parametrize("row", json.loads(FILE.read_text()), ids=name)
def test_counted(row):
    config = dataclasses.replace(named_config(row["model"]), resolution=row["resolution"])
    method = hvit_jax.make_reducer(row["method"], **row["args"]).resolve(config)
    counts = [layer.tokens_out for layer in method.schedule(config)]
    assert counts == row["tokens_after_block"]
    # The dropout after the position embedding, which published tables include, is left out.
    found = hvit_jax.count_flops(config, method) - method.encoder_dropout_flops(config)
    assert found / 1e9 == pytest.approx(row["gflops"], abs=6e-5)
