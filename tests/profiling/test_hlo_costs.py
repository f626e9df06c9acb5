"""What benchmarks/roofline.py makes of a compiled program's text, on one written by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

PROGRAM = """HloModule jit_f, is_scheduled=true

%add_in_place (p.0: f32[64,1024], p.1: s32[]) -> f32[64,1024] {
  %p.0 = f32[64,1024]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,1024}
  %twice = f32[1,1024]{1,0} add(%row, %row)
  ROOT %put = f32[64,1024]{1,0} dynamic-update-slice(%p.0, %twice, %p.1, %zero)
}

%body (arg: (s32[], f32[64,1024])) -> (s32[], f32[64,1024]) {
  %arg = (s32[], f32[64,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[64,1024]{1,0} get-tuple-element(%arg), index=1
  %new = f32[64,1024]{1,0} fusion(%x, %i), kind=kLoop, calls=%add_in_place, metadata={op_name="jit(f)/while/body/add"}
  ROOT %out = (s32[], f32[64,1024]{1,0}) tuple(%i, %new)
}

%condition (c: (s32[], f32[64,1024])) -> pred[] {
  %c = (s32[], f32[64,1024]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[16896,1024], b: bf16[1024,1024], s: (s32[], f32[64,1024])) -> bf16[16896,1024] {
  %a = bf16[16896,1024]{1,0} parameter(0)
  %b = bf16[1024,1024]{1,0} parameter(1)
  %s = (s32[], f32[64,1024]{1,0}) parameter(2)
  %loop = (s32[], f32[64,1024]{1,0}) while(%s), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %dot = (bf16[16896,1024]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def costs():
    path = Path(__file__).parents[2] / "benchmarks" / "hlo_costs.py"
    spec = importlib.util.spec_from_file_location("hlo_costs", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hlo_costs"] = module
    spec.loader.exec_module(module)
    return module


def test_kernels_of_a_program(costs):
    loop, product = costs.kernels(PROGRAM)
    assert (loop.kind, loop.times, loop.source) == ("other", 3, "add")
    # The index and one row are read, and one row is written where it was.
    assert loop.bytes == 4 + 2 * 4 * 1024
    assert (product.kind, product.times, product.source) == ("product", 1, "dot_general")
    assert product.flops == 2 * 16896 * 1024 * 1024
    # 132 x 4 tiles of 128 x 256 are four full waves on 132 processors.
    seconds = product.flops / costs.RATES["product"] + costs.LAUNCH
    assert product.seconds == pytest.approx(seconds)
    assert costs.total([loop, product]) == pytest.approx(3 * loop.seconds + seconds)


def test_one_row_more_begins_a_wave(costs):
    """130 rows more of 16,896 cost a fifth wave, not a hundredth more."""
    longer = costs.kernels(PROGRAM.replace("16896", "17026"))[1]
    assert 1.15 < longer.seconds / costs.kernels(PROGRAM)[1].seconds < 1.3


def test_a_product_in_float32_is_slower(costs):
    exact = costs.kernels(PROGRAM.replace("bf16", "f32"))[1]
    assert exact.seconds > 10 * costs.kernels(PROGRAM)[1].seconds
