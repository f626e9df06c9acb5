"""`--against`: timm's classes on our weights, and what each rival does not have."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.commands.profile import main
from hvit_jax.config import Rope
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import build_model, init_parameters
from hvit_jax.profiling import timm_vit
from hvit_jax.reducers import make_reducer
from tests.evaluation_setup import CONFIG
from tests.small_models import with_registers, without_class_token


def test_pytorch_of_its_own_is_swags_model_only(capsys):
    assert main(["--model", "vit_small_patch14_reg4_dinov2", "--against", "torch"]) == 2
    error = capsys.readouterr().err
    assert (
        "this one has other registers, position_prefix, layer_scale; --against timm builds it"
        in error
    )


OTHERS = {
    "registers and rotary positions": with_registers(CONFIG),
    "no tokens before the patches": without_class_token(CONFIG, activation="gelu_tanh"),
    "distilled": replace(
        CONFIG, distillation_token=True, position_prefix=2, pool="two heads", qkv_bias="none"
    ),
    "projected": replace(
        CONFIG, num_classes=0, projection=5, pre_norm=True, patch_bias=False, norm_eps=1e-5
    ),
    "positions of CLS, not of registers": replace(
        CONFIG, num_classes=0, registers=2, gated=True, activation="silu", layer_scale=True
    ),
    "mean": replace(CONFIG, pool="avg", final_norm=False, pooled_norm=True),
    "EVA": replace(
        CONFIG,
        **{"rope": replace(Rope.spaced(8), coordinates="grid", interleaved=True), "pool": "avg"},
        **{"gated": True, "activation": "silu", "mlp_norm": True, "qkv_bias": "qv"},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_timm_is_built_from_the_same_weights(name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm", reason="needs timm (the extra parity)")
    config, random = OTHERS[name], np.random.default_rng(0)
    timm_vit.check_timm(config)
    parameters = jax.tree.map(
        lambda leaf: np.array(leaf + random.normal(size=leaf.shape) / 8, np.float32),
        init_parameters(config, 0),
    )
    if config.qkv_bias == "qv":
        parameters["blocks"]["in_proj"]["bias"].reshape(config.depth, 3, -1)[:, 1] = 0
    images = random.normal(size=(2, *config.image_shape, 3)).astype(np.float32)
    with torch.inference_mode():
        model = timm_vit.timm_model(config, parameters)
        theirs = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    ours = build_model(config, make_reducer("dense"), parameters)(jnp.asarray(images))
    np.testing.assert_allclose(theirs, ours, atol=2e-5 * max(1, np.abs(ours).max()))


def test_what_timm_lacks_is_named():
    pytest.importorskip("timm", reason="needs timm (the extra parity)")
    with pytest.raises(InputError, match="CLS and the mean of the patches side by side"):
        timm_vit.check_timm(replace(CONFIG, pool="cls+avg"))
