"""Time the parts of a block, and what each method adds to it.

`python benchmarks/operations.py [MODEL] [BATCH] [DTYPE]` prints a Markdown table; without arguments
vit_b16 2 float32. Inputs are random.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hvit_jax.architectures import MODELS
from hvit_jax.config import DTYPES, Compute, ViTConfig
from hvit_jax.models.block import Block
from hvit_jax.ops.activations import gelu
from hvit_jax.ops.attention import attend, attend_and_score, class_attention
from hvit_jax.ops.clustered_attention import clustered_attention
from hvit_jax.ops.clustering import cluster_tokens
from hvit_jax.ops.grouping import group_means, group_tokens
from hvit_jax.ops.hashing import draw_hashes, draw_projections, project_asymmetric
from hvit_jax.ops.matching import match_tokens
from hvit_jax.ops.merging import merge_tokens
from hvit_jax.ops.selection import descending_order, keep_best
from hvit_jax.ops.sorting import ranks
from hvit_jax.profiling.device import describe_device, device_work, time_in_turns
from hvit_jax.system.run import leave, run

Operation = tuple[str, str, Callable[..., Any], tuple[Any, ...]]


def operations(config: ViTConfig, batch: int, dtype: str) -> Iterator[Operation]:
    """List a group, a name, a function and its arguments for everything that is timed."""
    tokens, heads, size = config.num_tokens, config.heads, config.head_dim
    block = Block(config, compute=Compute(dtype), rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(0), 9))
    x = jax.random.normal(next(keys), (batch, tokens, config.width), dtype)
    q, k, v = jax.random.normal(next(keys), (3, batch, tokens, heads, size), dtype)
    wide = jax.random.normal(next(keys), (batch, tokens, config.mlp_width), dtype)
    yield "block", "all of it", block, (x,)
    yield "block", "LayerNorm", block.ln_1, (x,)
    yield "block", "LayerNorm, projection to q, k, v", block.qkv, (x,)
    yield "block", "attention", attend, (q, k, v)
    yield "block", "projection", block.project, (q,)
    yield "block", "LayerNorm, MLP", block.mlp, (x,)
    yield "block", "GELU", gelu, (wide,)
    scores = jax.random.uniform(next(keys), (batch, tokens - 1))
    yield from _selecting(config, x, q, k, v, scores)
    hashes = draw_hashes(next(keys), size, 16)
    groups = jax.jit(group_tokens, static_argnames="max_groups")(q, hashes, max_groups=tokens // 2)
    yield "act", "group queries", lambda q: group_tokens(q, hashes, max_groups=tokens // 2), (q,)
    yield "act", "mean queries", group_means, (q, groups)
    lines = draw_projections(next(keys), size, 32)
    head_first = q.swapaxes(1, 2), k.swapaxes(1, 2)
    projected = jax.random.normal(next(keys), (32, batch, heads, tokens))
    yield "smyrf", "projections", lambda q, k: project_asymmetric(q, k, lines), head_first
    yield "smyrf", "ranks of the queries", ranks, (projected,)
    yield "smyrf", "the same by argsort", lambda p: jnp.argsort(jnp.argsort(p)), (projected,)
    sizes = {"q_cluster_size": 32, "k_cluster_size": 32}
    yield (
        "smyrf",
        "projections, ranks, attention",
        lambda *qkv: clustered_attention(*qkv, lines, **sizes),
        (q, k, v),
    )


def _selecting(config, x, q, k, v, scores) -> Iterator[Operation]:
    keep, r = (x.shape[1] - 1) // 2, 16
    yield "hourglass", "cluster to a quarter, 5 iterations", _cluster(config), (x[:, 1:],)
    yield "evit", "attention and its column mean", attend_and_score, (q, k, v)
    yield "evit, evo", "order", descending_order, (scores,)
    yield "evit, evo", "the same by argsort", lambda s: jnp.argsort(-s), (scores,)
    order = descending_order(scores)
    yield "evit", "keep half", functools.partial(keep_best, keep=keep, prefix=1), (x, scores, order)
    yield "tome", "match", lambda k: match_tokens(k.mean(2), r=r), (k,)
    matching = match_tokens(k.mean(2), r=r)
    yield "tome", "merge", lambda x, m: merge_tokens(x, jnp.ones(x.shape[:2]), m), (x, matching)
    yield "evo, ats", "attention of CLS", functools.partial(class_attention, prefix=1), (q, k)


def _cluster(config: ViTConfig) -> Callable[..., Any]:
    rows, columns = config.grid
    return lambda patches: cluster_tokens(
        patches,
        grid=config.grid,
        clusters=(rows // 2, columns // 2),
        iters=5,
        window=5,
        temperature=1.0,
    )


def main() -> None:
    """Time everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="vit_b16", choices=MODELS)
    parser.add_argument("batch", nargs="?", default=2, type=int)
    parser.add_argument("dtype", nargs="?", default="float32", choices=DTYPES)
    options = parser.parse_args()
    name, batch, dtype = options.model, options.batch, options.dtype
    config = MODELS[name]
    about = describe_device()
    print(f"{about['device']} ({about['processor']}), jax {about['versions']['jax']}: ", end="")
    print(f"{name} at {config.image_shape[0]}, batch {batch}, {dtype}\n")
    print("| part of | operation | ms | fastest to slowest |\n|---|---|---:|---:|")
    for group, label, function, inputs in operations(config, batch, dtype):
        compiled = jax.jit(function)
        work = device_work(functools.partial(compiled, *inputs))
        (rounds,) = time_in_turns([work], seconds=0.3)
        middle, low, high = (1e3 * f(rounds) for f in (statistics.median, min, max))
        print(f"| {group} | {label} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)


if __name__ == "__main__":
    leave(run(main, "operations.py"))
