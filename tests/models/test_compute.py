"""How a model is computed: what `load` and `create` take, as one record."""

import jax.numpy as jnp
import pytest

import hvit_jax
from hvit_jax import Compute, InputError
from hvit_jax.evaluation import EvalConfig
from hvit_jax.exporting import ExportConfig
from hvit_jax.training import TrainConfig


def test_weights_are_stored_as_blocks_compute_unless_told_otherwise():
    assert Compute("bfloat16").types == (jnp.bfloat16, jnp.bfloat16)
    assert Compute("bfloat16", "float32").types == (jnp.bfloat16, jnp.float32)


def test_a_model_has_the_record_it_was_made_with(small_config):
    made = hvit_jax.create(small_config, dtype="bfloat16", param_dtype="float32", unroll=True)
    assert made.compute == Compute(dtype="bfloat16", param_dtype="float32", unroll=True)
    assert made.dtype == jnp.bfloat16 and made.patch_embed.kernel.dtype == jnp.float32


def test_types_may_be_given_themselves(small_config):
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"):
        made = hvit_jax.create(small_config, dtype=dtype, param_dtype=jnp.float32)
        assert made.compute == Compute("bfloat16", "float32") == Compute(dtype, jnp.float32)
    config = EvalConfig(compute=Compute(dtype=jnp.bfloat16))
    assert config == EvalConfig(compute=Compute("bfloat16"))
    assert config.words() == ["--dtype", "bfloat16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "float16"},
            "^dtype must be one of float32, bfloat16, float64, float8: 'float16'",
        ),
        ({"param_dtype": "int8"}, "^param_dtype must be one of float32, bfloat16, float64: 'int8'"),
        ({"attention": "flash"}, "^attention must be one of auto, .*: 'flash'"),
        ({"dtype": "float64"}, "needs JAX_ENABLE_X64=1"),
        ({"dtype": "float8", "param_dtype": "bfloat16"}, "leave param_dtype out"),
    ],
)
def test_wrong_options(small_config, options, message):
    with pytest.raises(InputError, match=message):
        hvit_jax.create(small_config, **options)


def test_commands_without_float8_refuse_it():
    message = "^--dtype must be one of float32, bfloat16: 'float8'"
    with pytest.raises(InputError, match=message):
        TrainConfig(data="pictures", output="run", compute=Compute("float8"))
    with pytest.raises(InputError, match=message):
        ExportConfig(output="exported", compute=Compute("float8"))
