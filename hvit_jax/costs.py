"""What a model costs under a method, and methods at a like cost."""

from __future__ import annotations

from hvit_jax.config import ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.ops.flops import stem_and_head
from hvit_jax.reducers import Reducer, method_class


def count_flops(config: ViTConfig, reducer: Reducer) -> int:
    """Count a whole model for one image, in the tables' convention.

    Args:
        config: the model's sizes; the tables' 1000-class head is counted whatever its head is,
            unless a projection or a decoder stands in its place. A decoder with taps restores each
            of them, which is counted as if all stood behind the last block.
        reducer: the method.

    Returns:
        Multiply-adds; divide by 1e9 for the tables' "GFLOPs".
    """
    reducer = reducer.resolve(config)
    layers = reducer.schedule(config)
    blocks = sum(reducer.block_flops(config, layer) for layer in layers)
    tokens, patches = layers[-1].tokens_out, config.num_patches
    restoring, decoder = 0, config.decoder
    if decoder is not None:
        spreads = reducer.spreads_masks(config)
        patches = tokens - config.prefix_tokens if spreads else patches
        channels = decoder.outputs if spreads else config.width
        restoring = max(1, len(decoder.taps)) * reducer.restore_flops(config, channels)
    around = stem_and_head(config, tokens, patches) + reducer.encoder_dropout_flops(config)
    return around + blocks + restoring


def at_cost(method: str, config: ViTConfig, share: float) -> Reducer:
    """Find the setting of a method whose cost is nearest to a share of the dense model's.

    Args:
        method: a name in `hvit_jax.REDUCERS`, or two with + between for the chain of both; its
            settings are those of `Reducer.strengths`. Methods that change attention alone cannot
            come near a small share.
        config: the model's sizes.
        share: of the dense model's multiply-adds, above 0 and at most 1.

    Returns:
        The method, resolved for the model.

    Raises:
        InputError: for an unknown method, or a share out of range.
    """
    if not 0 < share <= 1:
        raise InputError(f"the share of the dense cost must be above 0 and at most 1: {share:g}")
    wanted = share * count_flops(config, Reducer())
    settings = [reducer.resolve(config) for reducer in method_class(method).strengths(config)]
    return min(settings, key=lambda reducer: abs(count_flops(config, reducer) - wanted))


def cost_share(config: ViTConfig, reducer: Reducer) -> float:
    """Compare a method's multiply-adds with the dense model's, in the tables' convention."""
    return count_flops(config, reducer) / count_flops(config, Reducer())
