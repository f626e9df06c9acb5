"""Segments: blocks in a row that share one compiled program."""

from __future__ import annotations

from hvit_jax.models.reducer import Layer


def segments(layers: tuple[Layer, ...], *, unroll: bool = False) -> list[tuple[Layer, int]]:
    """Group consecutive blocks that can share one scanned program.

    Blocks share it if their entries are equal and keep the token count.

    Args:
        layers: the schedule.
        unroll: give every block a segment of its own.
    """
    runs: list[tuple[Layer, int]] = []
    for layer in layers:
        same = runs and runs[-1][0] == layer and layer.tokens_in == layer.tokens_out
        if same and not unroll:
            runs[-1] = (layer, runs[-1][1] + 1)
        else:
            runs.append((layer, 1))
    return runs
