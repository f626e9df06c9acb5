"""Several devices of one process: eval.py's results are those of one device."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from hvit_jax.distributed.placement import place
from hvit_jax.errors import InputError
from hvit_jax.training import TrainConfig
from tests.evaluation_setup import make_checkpoint, make_pictures, results_of
from tests.scale_setup import EIGHT, EVALUATE, assert_same_predictions, run_python


def test_eight_devices_score_as_one_does(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "tiny")
    pictures = make_pictures(tmp_path / "pictures", count=21)
    (pictures / "c0" / "000.png").write_bytes(b"no picture")
    words = ("--method", "evit", "--drop-locations", "1", "--on-error", "skip")
    one, rows = results_of(pictures, checkpoint, tmp_path, *words, "-b", "8")
    files = tmp_path / "eight.json", tmp_path / "eight.npz"
    written = ("--output", files[0], "--predictions", files[1])
    command = (pictures, "--checkpoint", checkpoint, "-j", "0", *words, "-b", "9", *written)
    done = run_python(EVALUATE, *command, **EIGHT)
    assert done.returncode == 0, done.stderr
    eight, others = json.loads(files[0].read_text()), np.load(files[1])
    assert (one["devices"], eight["devices"], eight["processes"]) == (1, 8, 1)
    # 9 is no multiple of 8, nor is 21 one of 16.
    assert eight["batch_size"] == 16 and "8 x cpu" in done.stdout
    assert eight["images"] == 20 and eight["skipped"] == one["skipped"]
    assert 0 <= eight["input_wait"] <= 1
    for name in ("top1", "top5", "images", "not_finite", "report"):
        assert eight[name] == one[name]
    assert eight["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert_same_predictions(others, rows)


def test_a_batch_is_rounded_up_to_the_devices():
    placement = place(jax.devices()[:1])
    assert (placement.devices, placement.processes, placement.round_up(7)) == (1, 1, 7)


def test_a_batch_of_training_divides_by_parts_and_devices():
    options = dict(model="vit_b16", accumulate=2)
    fits, wrong = (
        TrainConfig("data", Path("run"), batch_size=size, **options) for size in (16, 20)
    )
    fits.check_devices(8)
    message = r"--batch-size 20 does not divide by 16 \(--accumulate 2 and 8 devices\).*does: 16"
    with pytest.raises(InputError, match=message):
        wrong.check_devices(8)


SHARED = """
import jax, numpy as np
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.models.parameters import init_parameters
from hvit_jax.distributed.placement import place
from hvit_jax.reducers import make_reducer
from hvit_jax.training.trainer import Trainer, make_optimizer
from tests.small_models import with_registers

config = ViTConfig(16, patch_size=8, depth=3, width=64, heads=2, mlp_width=256)
config = with_registers(config, num_classes=7)
reducer = make_reducer("evit", drop_locations=(1,)).resolve(config)
optimizer = make_optimizer(1e-3, steps=9, warmup=1, weight_decay=0.1, layer_decay=0.9)
random = np.random.default_rng(0)
pixels = random.integers(0, 256, (16, 16, 16, 3), np.uint8)
labels = random.integers(0, 7, 16, np.int32)
states, sizes = [], []
for shard in (False, True):
    placement = place(shard=shard)
    compute = Compute(remat=True)
    options = dict(ema=0.9, accumulate=2, distill=0.5, temperature=2.0)
    trainer = Trainer(config, reducer, optimizer, placement, compute, **options)
    parameters = init_parameters(config, 0)
    teacher = placement.shard_state(trainer.teacher(parameters))
    state = placement.shard_state(trainer.init(parameters))
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(trainer.step, out_shardings=layout)
    batch = placement.shard_batch(pixels), placement.shard_batch(labels), teacher
    compiled = step.lower(state, *batch).compile()
    sizes.append(compiled.memory_analysis().argument_size_in_bytes)
    for _ in range(3):
        state = compiled(state, *batch)
    states.append((state.sums["loss"], placement.gather(state)))
np.testing.assert_allclose(states[1][0], states[0][0], rtol=1e-5)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), *states)
assert sizes[1] < sizes[0] / 6, sizes
"""


def test_a_shared_state_trains_as_copies_do_and_takes_an_eighth():
    done = run_python(SHARED, **EIGHT)
    assert done.returncode == 0, done.stderr


LOADED = """
import sys, jax, numpy as np
import hvit_jax

options = dict(drop_locations=(1,), resolution=(24, 32))
whole = hvit_jax.load(sys.argv[1], "evit", **options)
shared = hvit_jax.load(sys.argv[1], "evit", **options, devices=jax.devices())
images = np.random.default_rng(0).normal(size=(2, 24, 32, 3)).astype(np.float32)
images = jax.numpy.asarray(images)
expected, found = (hvit_jax.jit_model(model)(images) for model in (whole, shared))
np.testing.assert_allclose(found, expected, atol=1e-5)
for blocks in shared.segments:
    kernel = blocks.linear_1.kernel[...]
    assert {part.data.size * 8 for part in kernel.addressable_shards} == {kernel.size}
"""


def test_eight_devices_hold_an_eighth_of_the_blocks_each(tmp_path):
    done = run_python(LOADED, make_checkpoint(tmp_path / "checkpoint"), **EIGHT)
    assert done.returncode == 0, done.stderr
