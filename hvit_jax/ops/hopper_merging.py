"""Merging matched tokens, and normalising what comes of it, in a kernel for NVIDIA's Hopper GPUs.

In Pallas (Mosaic GPU). XLA takes five kernels: two gather tokens for a product that adds them up,
one puts sums and kept tokens in their places, one normalises these.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

# Threads of a block, and rows, which are all fetched at once.
_THREADS, _ROWS = 128, 4


@functools.partial(jax.jit, static_argnames=("epsilon", "dtype"))
def merge_and_normalise(
    x: Float[Array, "B N C"],
    sizes: Float[Array, "B N"],
    sources: Int[Array, "B M"],
    joined: Int[Array, "B M"],
    leaving: Int[Array, "B R"],
    following: Int[Array, "B R"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, "B M C"], Float[Array, "B M"], Float[Array, "B M C"]]:
    """Merge tokens as `ops.merging.merge_tokens` does, and normalise them; it has no gradient.

    Args:
        x: tokens of 16 bits; channels by `ops.merging.KERNEL_CHANNELS`.
        sizes: input tokens that each of them stands for.
        sources: where each new token stood.
        joined: the number of a leaving token that joins each new one; -1: none does.
        leaving: positions of the tokens that leave.
        following: for each of these the next one that joins the same token; -1: it is the last.
        scale: of the LayerNorm; rounded to the dtype of `x`.
        bias: of the LayerNorm; rounded so too.
        epsilon: added to the variance.
        dtype: of normalised tokens.

    Returns:
        The merged tokens in the dtype of `x`, their sizes, and what LayerNorm gives of them.
    """
    batch, rows = sources.shape
    width = x.shape[-1]
    # A thread takes so many neighbouring channels at a time, of 16 and of 32 bits alike.
    together = next(count for count in (8, 4, 2) if width % (count * _THREADS) == 0)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=together)

    def hopper_merging(
        x_ref, sizes_ref, sources_ref, joined_ref, leaving_ref, following_ref, scale_ref, bias_ref,
        merged_ref, totals_ref, normed_ref,
    ):  # fmt: skip
        first = lax.axis_index("rows") * _ROWS
        # The last block does its last row several times.
        numbers = [jnp.minimum(first + row, batch * rows - 1) for row in range(_ROWS)]
        places = [(lax.div(number, rows), lax.rem(number, rows)) for number in numbers]
        sources = [(image, sources_ref[image, row]) for image, row in places]
        # All that is read of every row comes first, so that it is under way together.
        tokens = [(plgpu.load(x_ref, place, layout=layout), sizes_ref[place]) for place in sources]
        others = [joined_ref[place] for place in places]
        parameters = [
            plgpu.load(ref, (), layout=layout).astype(x.dtype) for ref in (scale_ref, bias_ref)
        ]
        scale, bias = (parameter.astype(jnp.float32) for parameter in parameters)
        for place, (token, size), other in zip(places, tokens, others, strict=True):
            image = place[0]

            def add(carry, image=image):
                number, total, sums = carry
                other = leaving_ref[image, number]
                size = sizes_ref[image, other]
                token = plgpu.load(x_ref, (image, other), layout=layout)
                sums = sums + token.astype(jnp.float32) * size
                return following_ref[image, number], total + size, sums

            start = other, size, token.astype(jnp.float32) * size
            _, total, sums = lax.while_loop(lambda carry: carry[0] >= 0, add, start)
            merged = (sums / total).astype(x.dtype)
            merged_ref[place] = merged
            totals_ref[place] = total
            wide = merged.astype(jnp.float32)
            centred = wide - wide.sum() * (1 / width)
            variance = (centred * centred).sum() * (1 / width)
            factor = lax.rsqrt(variance + epsilon) * scale
            normed_ref[place] = (centred * factor + bias).astype(dtype)

    run = plgpu.kernel(
        hopper_merging,
        out_type=[
            jax.ShapeDtypeStruct((batch, rows, width), x.dtype),
            jax.ShapeDtypeStruct((batch, rows), jnp.float32),
            jax.ShapeDtypeStruct((batch, rows, width), dtype),
        ],
        grid=(pl.cdiv(batch * rows, _ROWS),),
        grid_names=("rows",),
        # Nothing is shared between threads but by sums, which wait for each other.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    run = jax.enable_x64(False)(run)
    return tuple(run(x, sizes, sources, joined, leaving, following, scale, bias))
