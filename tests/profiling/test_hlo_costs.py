"""What benchmarks/roofline.py makes of a compiled program's text, and how near it comes."""

import gzip
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

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


ATTENTION = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: bf16[32,1025,48,64]) -> f32[32,16,1152] {
  %x = bf16[32,1025,48,64]{3,2,1,0} parameter(0)
  %k = bf16[32,1025,16,64]{3,2,1,0} custom-call(%x, %x, %x), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/hopper_attention/mpmd_map"}
  %logs = f32[32,16,1088]{2,1,0} constant({...})
  %means = bf16[32,480,16,64]{3,2,1,0} custom-call(%k, %logs), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/hopper_means/mpmd_map"}
  ROOT %sums = f32[32,16,1152]{2,1,0} custom-call(%k, %k, %logs), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/hopper_column_sums/mpmd_map"}
}
"""  # noqa: E501

ARITHMETIC = """HloModule jit_f, is_scheduled=true

%to_float8 (p: bf16[32800,1024]) -> f8e4m3fn[32800,1024] {
  %p = bf16[32800,1024]{1,0} parameter(0)
  ROOT %small = f8e4m3fn[32800,1024]{1,0} convert(%p)
}

%cut (whole: bf16[24,1024,1024], i: s32[]) -> bf16[1,1024,1024] {
  %whole = bf16[24,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %one = bf16[1,1024,1024]{2,1,0} dynamic-slice(%whole, %i, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
}

%put (old: s32[16384,1024], at: s32[16777216,2], new: s32[16777216,1,1]) -> s32[16384,1024] {
  %old = s32[16384,1024]{1,0} parameter(0)
  %at = s32[16777216,2]{1,0} parameter(1)
  %new = s32[16777216,1,1]{2,1,0} parameter(2)
  ROOT %all = s32[16384,1024]{1,0} scatter(%old, %at, %new), update_window_dims={1,2}, to_apply=%take
}

ENTRY %main (x: bf16[32800,1024], w: bf16[24,1024,1024], i: s32[], keys: f32[132,1024], old: s32[16384,1024], at: s32[16777216,2], new: s32[16777216,1,1]) -> f32[132,1024] {
  %x = bf16[32800,1024]{1,0} parameter(0)
  %w = bf16[24,1024,1024]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %keys = f32[132,1024]{1,0} parameter(3)
  %old = s32[16384,1024]{1,0} parameter(4)
  %at = s32[16777216,2]{1,0} parameter(5)
  %new = s32[16777216,1,1]{2,1,0} parameter(6)
  %started = ((bf16[24,1024,1024]{2,1,0}, s32[]), bf16[1,1024,1024]{2,1,0}, u32[]) fusion-start(%w, %i), kind=kLoop, calls=%cut
  %rounded = f8e4m3fn[32800,1024]{1,0} fusion(%x), kind=kLoop, calls=%to_float8
  %weights = bf16[1,1024,1024]{2,1,0} fusion-done(%started)
  %scattered = s32[16384,1024]{1,0} fusion(%old, %at, %new), kind=kInput, calls=%put
  ROOT %sorted = f32[132,1024]{1,0} sort(%keys), dimensions={1}, to_apply=%less
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def costs():
    spec = importlib.util.spec_from_file_location("hlo_costs", BENCHMARKS / "hlo_costs.py")
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
    seconds = product.flops / costs.RATES["product"] + costs.IDLE
    assert product.seconds == pytest.approx(seconds)
    assert costs.total([loop, product]) == pytest.approx(3 * loop.seconds + seconds)


def test_few_rows_are_one_wave(costs):
    """1,032 rows are 99 tiles of 128 x 96, which take as long as 132."""
    product = costs.kernels(PROGRAM.replace("16896", "1032"))[1]
    wave = 2 * 132 * 128 * 96 * 1024 / costs.RATES["product"]
    assert product.seconds == pytest.approx(wave + costs.IDLE)


def test_a_product_in_float32_is_slower(costs):
    rounded = PROGRAM.replace("bf16", "f32")
    highest = '"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]},"dot_dimension'
    exact = rounded.replace('"dot_dimension', highest)
    fast, tf32, slow = (costs.kernels(x)[1].seconds for x in (PROGRAM, rounded, exact))
    assert slow > 10 * fast and tf32 == pytest.approx(2 * fast, rel=0.1)


def test_our_attention(costs):
    """512 heads of 6 blocks of 192 queries are 24 waves; of 18 warpgroups 17 have queries.

    1,025 keys are 1,032 for scores and 1,088 for values. 3 blocks of groups are 12 waves; 8
    warpgroups of 9 work.
    """
    attention, means, sums = costs.kernels(ATTENTION)
    key = 2 * 64 * 64 / (500e12 / 132)
    work = 17 / 6 * (1032 + 1088) * key
    assert attention.seconds == pytest.approx(24 * (costs.ATTENTION_START + work) + costs.IDLE)
    assert attention.flops == 4 * 32 * 16 * 1025**2 * 64
    work = 8 / 3 * 1088 * key
    assert means.seconds == pytest.approx(12 * (costs.ATTENTION_START + work) + costs.IDLE)
    assert means.flops == 2 * 32 * 16 * 480 * 1025 * 64
    # Its sums of columns are without values.
    work = 17 / 6 * 1032 * key
    assert sums.seconds == pytest.approx(24 * (costs.ATTENTION_START + work) + costs.IDLE)
    assert (attention.kind, sums.kind) == ("attention", "attention")


def _with(kind):
    """Give attention an operand more."""
    call, more = "custom-call(%x, %x, %x", f"  %more = {kind} constant({{...}})\n  %k ="
    return ATTENTION.replace(f"{call})", f"{call}, %more)").replace("  %k =", more)


def test_our_attention_takes_a_bias_as_channels(costs):
    biased = costs.kernels(_with("bf16[32,1,1025,16]{3,2,1,0}"))[0].seconds
    work = 24 * 17 / 6 * 1032 * 2 * 64 * 16 / (500e12 / 132)
    assert biased == pytest.approx(costs.kernels(ATTENTION)[0].seconds + work)


def test_our_attention_reads_weights_of_pairs(costs):
    weighted = _with("bf16[512,1040,1088]{2,1,0}")
    (plain, *_), (attention, *_) = costs.kernels(ATTENTION), costs.kernels(weighted)
    assert attention.bytes == 2 * 512 * 1040 * 1088
    # They arrive while others are multiplied, and take no longer.
    assert attention.bytes / 3.0e12 < plain.seconds == attention.seconds


def test_rounding_cutting_scattering_and_sorting(costs):
    cut, rounded, scattered, ordered = costs.kernels(ARITHMETIC)
    # Of 24 blocks' weights one is read and written, with its number.
    assert cut.bytes == 2 * 2 * 1024**2 + 4
    assert rounded.bytes == (2 + 1) * 32800 * 1024
    # Rounding takes longer than reading 67 and writing 34 MB.
    assert rounded.seconds == pytest.approx(36 * 32800 * 1024 / 26e12 + costs.IDLE)
    # Every number takes 32 bytes with it; places and numbers are read.
    assert scattered.bytes == (32 + 8 + 4) * 2**24
    # A row on each of 132 processors, 55 times through 1,024 numbers.
    assert ordered.seconds == pytest.approx(132 * 1024 * 55 / 2.4e12 + costs.IDLE)


def test_the_smallest_kernels_take_time_too(costs):
    (loop, _) = costs.kernels(PROGRAM)
    assert loop.seconds == costs.SHORTEST + costs.IDLE


def test_rows_are_estimated_from_programs_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # The script does so itself, for good.
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    roofline = importlib.import_module("roofline")
    for name, rows in (("dense", 16896), ("dense-float8", 8448)):
        text = PROGRAM.replace("16896", str(rows)).encode()
        (tmp_path / f"vit-l16-{name}.txt.gz").write_bytes(gzip.compress(text))
    words = ["--rows", "vit_l16 dense(, float8)?$", "--programs", str(tmp_path)]
    roofline.main([*words, "--output", str(tmp_path / "found.json")])
    dense, other = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert dense["launches"] == 4 and dense["batch"] == 32
    assert dense["multiply_adds_of_products"] == pytest.approx(16896 * 1024**2 / 32e9, abs=0.1)
    assert other["x_dense"] == pytest.approx(dense["ms"] / other["ms"], abs=1e-3)
    # As many GFLOPs, so that its share is its speed-up.
    assert other["share"] == other["x_dense"] > 1.5
    assert "| vit_l16 dense, float8 |" in capsys.readouterr().out
    roofline.main([*words, "--operations"])
    assert "| product | dot_general | bf16[16896, 1024] | 1 |" in capsys.readouterr().out


def test_estimates_come_near_what_was_measured():
    """The published estimates, row by row; SMYRF is mostly arithmetic outside products."""
    read = (BENCHMARKS / "results" / f"{name}-h200.json" for name in ("roofline", "nvidia"))
    estimated, measured = (
        {
            (row["row"], row["unrolled"], row["batch"]): row["ms"]
            for row in json.loads(path.read_text())["rows"]
            if "unrolled" in row and not row.get("older_code")
        }
        for path in read
    )
    both = estimated.keys() & measured.keys()
    assert len(both) >= 21
    for row in both:
        allowed = 0.25 if "smyrf" in row[0] else 0.12
        assert estimated[row] == pytest.approx(measured[row], rel=allowed), row
