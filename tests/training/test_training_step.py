"""One training step: what is trained, how fast, in how many parts, with how much memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hvit_jax
from hvit_jax import Compute
from hvit_jax.distributed.placement import place
from hvit_jax.models.parameters import init_parameters
from hvit_jax.training.trainer import (
    Trainer,
    distillation_loss,
    make_optimizer,
    no_sums,
    update_average,
)

CONFIG = hvit_jax.ViTConfig(16, 4, depth=3, width=16, heads=2, mlp_width=32, num_classes=5)
TWO = dataclasses.replace(CONFIG, depth=2)
RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (8, 16, 16, 3), np.uint8)
LABELS = RANDOM.integers(0, 5, 8).astype(np.int32)
TARGETS = np.eye(5, dtype=np.float32)[LABELS]
FROZEN = ("patch_embed", "class_token", "pos_embedding", "blocks", "ln")


def make_trainer(method="dense", optimizer=None, model=CONFIG, **options):
    reducer = hvit_jax.make_reducer(method).resolve(model)
    one = place(jax.devices()[:1])
    return Trainer(model, reducer, optimizer or optax.sgd(0.1), one, **options)


def begin(trainer, parameters):
    """Put a run's first state where its steps leave the next ones, which compiles them once."""
    return trainer.placement.shard_state(trainer.init(parameters))


def without_sums(trainer, state):
    return state._replace(sums=trainer.placement.replicate(no_sums()))


def gradients(trainer, parameters):
    teacher = trainer.teacher(parameters)
    grads, metrics = jax.jit(trainer.gradients)(parameters, {}, PIXELS, TARGETS, teacher)
    return {"grads": grads, "metrics": metrics}


def assert_close(tree, other, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), tree, other
    )


def compiled_step(trainer, parameters):
    state = jax.eval_shape(trainer.init, parameters)
    return jax.jit(trainer.step).lower(state, PIXELS, LABELS).compile()


def test_the_head_alone_is_trained_and_nothing_runs_backward_below_it():
    optimizer = make_optimizer(0.1, steps=7, warmup=0, weight_decay=0.1)
    parameters = init_parameters(CONFIG, 0)
    head, whole = (make_trainer(optimizer=optimizer, head_only=only) for only in (True, False))
    state = head.init(parameters)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sorted(moments) == [(5,), (5,), (16, 5), (16, 5)]
    before = jax.tree.map(np.array, parameters)
    after = jax.jit(head.step)(state, PIXELS, LABELS)
    for name in FROZEN:
        jax.tree.map(np.testing.assert_array_equal, after.parameters[name], before[name])
    assert np.abs(after.parameters["head"]["kernel"] - before["head"]["kernel"]).max() > 0.01
    # The forward pass is a third of a whole step.
    flops = [compiled_step(each, parameters).cost_analysis()["flops"] for each in (head, whole)]
    assert flops[0] < 0.5 * flops[1]
    whole_grads = gradients(whole, parameters)["grads"]
    trained = {"head": parameters["head"]}
    frozen = {name: parameters[name] for name in FROZEN}
    head_grads, _ = jax.jit(head.gradients)(trained, frozen, PIXELS, TARGETS)
    assert_close(head_grads, {"head": whole_grads["head"]}, 1e-6)


def test_layers_below_the_head_move_less():
    options = dict(steps=7, warmup=0, weight_decay=0.5)
    parameters = init_parameters(CONFIG, 0)
    grads = jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape).astype("f"), parameters)
    moves = []
    for layer_decay in (1.0, 0.5):
        optimizer = make_optimizer(0.1, **options, layer_decay=layer_decay)
        state = optimizer.init(parameters)
        moves.append(jax.jit(optimizer.update)(grads, state, parameters)[0])
    ratios = jax.tree.map(lambda slow, fast: np.asarray(slow / fast), moves[1], moves[0])
    for name, expected in (("head", 1), ("ln", 1), *((name, 0.5**4) for name in FROZEN[:3])):
        for leaf in jax.tree.leaves(ratios[name]):
            np.testing.assert_allclose(leaf, expected, rtol=1e-5)
    for leaf in jax.tree.leaves(ratios["blocks"]):
        for block, expected in enumerate((0.125, 0.25, 0.5)):
            np.testing.assert_allclose(leaf[block], expected, rtol=1e-5)


# Blocks that are scanned, and blocks that each run on their own.
@pytest.mark.parametrize("method", ["dense", "tome"])
def test_remat_changes_no_gradient(method):
    config = dataclasses.replace(CONFIG, depth=2)
    parameters = init_parameters(config, 0)
    plain, remat = (
        gradients(make_trainer(method, model=config, compute=Compute(remat=remat)), parameters)
        for remat in (False, True)
    )
    assert_close(remat, plain, 1e-5)


def test_remat_takes_less_memory():
    config = dataclasses.replace(CONFIG, depth=12, resolution=32)
    pixels = np.zeros((8, 32, 32, 3), np.uint8)
    parameters = init_parameters(config, 0)
    bytes = []
    for remat in (False, True):
        trainer = make_trainer(model=config, compute=Compute(remat=remat))
        state = jax.eval_shape(trainer.init, parameters)
        compiled = jax.jit(trainer.step).lower(state, pixels, LABELS).compile()
        bytes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert bytes[1] < 0.4 * bytes[0]


def test_parts_of_a_batch_add_up_to_it():
    parameters = init_parameters(TWO, 0)
    whole, parts = (
        gradients(make_trainer("evit", model=TWO, accumulate=parts, distill=0.4), parameters)
        for parts in (1, 4)
    )
    assert_close(parts, whole, 1e-5)


def test_divergence_of_what_two_models_say():
    """KL((3/4, 1/4), (1/2, 1/2)) = ln 2 - H(3/4); at temperature 2 the shares' roots are taken."""
    taught, said = np.log([[3.0, 1.0], [9.0, 1.0]]), np.zeros((2, 2))
    found = distillation_loss(jnp.array(said), jnp.array(taught), 1.0)
    expected = np.log(2) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    assert float(found[0]) == pytest.approx(expected, rel=1e-6)
    found = distillation_loss(jnp.array(said), jnp.array(taught), 2.0)
    assert float(found[1]) == pytest.approx(4 * expected, rel=1e-6)


def test_the_dense_model_teaches():
    parameters = init_parameters(TWO, 0)
    trainer = make_trainer("evit", model=TWO, distill=0.3, temperature=2.0)
    images = trainer.normalize(jnp.asarray(PIXELS))
    dense, reduced = (
        hvit_jax.jit_model(make_trainer(name, model=TWO).model(parameters))(images)
        for name in ("dense", "evit")
    )
    labels = optax.softmax_cross_entropy_with_integer_labels(reduced, LABELS).mean()
    dense, reduced = (np.asarray(jax.nn.log_softmax(each / 2)) for each in (dense, reduced))
    divergence = 4 * (np.exp(dense) * (dense - reduced)).sum(-1).mean()
    expected = float(0.7 * labels + 0.3 * divergence)
    found = gradients(trainer, parameters)["metrics"]["loss"]
    assert float(found) == pytest.approx(expected, rel=1e-5) and divergence > 1e-3


def test_the_teacher_stays_as_it_was():
    """Where the head alone is trained, it is the head that the run began with."""
    parameters = init_parameters(TWO, 0)
    trainer = make_trainer("evit", model=TWO, distill=1.0, temperature=2.0, head_only=True)
    state, teacher = begin(trainer, parameters), trainer.teacher(parameters)
    assert teacher.keys() == {"head"} and make_trainer("evit").teacher(parameters) is None
    step = jax.jit(trainer.step, donate_argnums=0)
    losses = []
    for _ in range(3):
        state = step(without_sums(trainer, state), PIXELS, LABELS, teacher)
        losses.append(float(state.sums["loss"]))
    assert losses[0] > losses[1] > losses[2] > 0


def test_the_average_follows_the_parameters_and_is_the_result():
    parameters = init_parameters(CONFIG, 0)
    trainer = make_trainer(ema=0.15, head_only=True)
    state = begin(trainer, parameters)
    assert trainer.init(parameters).average.keys() == {"head"}
    kernels = [np.array(parameters["head"]["kernel"])]
    step = jax.jit(trainer.step, donate_argnums=0)
    for _ in range(3):
        state = step(state, PIXELS, LABELS)
        kernels.append(np.array(state.parameters["head"]["kernel"]))
    expected = kernels[0]
    # min(0.15, (1 + step) / (10 + step)) of the old average stays.
    for kept, kernel in zip((0.1, 0.15, 0.15), kernels[1:], strict=True):
        expected = kept * expected + (1 - kept) * kernel
    result = trainer.result(state)
    np.testing.assert_allclose(result["head"]["kernel"], expected, rtol=1e-5, atol=1e-7)
    assert result["blocks"] is state.parameters["blocks"]


def test_without_an_average_the_parameters_are_the_result():
    parameters = init_parameters(CONFIG, 0)
    trainer = make_trainer()
    state = trainer.init(parameters)
    assert state.average is None
    assert update_average(None, parameters, jnp.zeros((), jnp.int32), 0.0) is None
    assert trainer.result(state)["head"] is state.parameters["head"]


def test_sums_grow_until_they_begin_again():
    trainer = make_trainer(optimizer=optax.sgd(0.0))
    state, sums = begin(trainer, init_parameters(CONFIG, 0)), []
    step = jax.jit(trainer.step)
    for _ in range(2):
        state = step(state, PIXELS, LABELS)
        sums.append(jax.device_get(state.sums))
    state = step(without_sums(trainer, state), PIXELS, LABELS)
    sums.append(jax.device_get(state.sums))
    assert [each["steps"] for each in sums] == [1, 2, 1]
    losses = [float(each["loss"]) for each in sums]
    np.testing.assert_allclose(losses, np.array([1, 2, 1]) * losses[0], rtol=1e-6)
