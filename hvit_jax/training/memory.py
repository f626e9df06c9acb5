"""What makes a training step need less memory, as a message proposes it."""

from __future__ import annotations

import argparse


def less_memory(options: argparse.Namespace, devices: int) -> str:
    """Name options that help where a step does not fit; the first of them changes no result.

    Args:
        options: of the command line.
        devices: that share a batch.
    """
    size, parts = options.batch_size, options.accumulate * devices
    fits = (n for n in range(options.accumulate + 1, size + 1) if size % (n * devices) == 0)
    more = next(fits, 0)
    half = size // parts // 2 * parts
    words = [
        *([f"--accumulate {more}"] if more else []),
        *(["--remat"] if not options.remat and options.train != "head" else []),
        *(["--shard-parameters"] if devices > 1 and not options.shard_parameters else []),
        *([f"--batch-size {half}"] if half else []),
    ]
    return f"try {', or '.join(words)}" if words else "a smaller --resolution needs less"
