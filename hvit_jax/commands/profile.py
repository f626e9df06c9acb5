"""`python profile.py` and `hvit profile`: what a reduction method gains on this machine."""

from __future__ import annotations

from hvit_jax.commands.flags import command
from hvit_jax.profiling import ProfileConfig, profile

PROGRAM = "hvit profile"
DESCRIPTION = """Measure what a token reduction method gains on this machine: GFLOPs, latency,
throughput, memory and compile time, beside the dense model in the same run. Weights are random
unless --checkpoint is given; speed does not depend on them."""
SOME_FAILED = 1  # Exit status: a row has an error in place of numbers.


def _profile(config: ProfileConfig) -> int:
    return SOME_FAILED if any(row.error is not None for row in profile(config)) else 0


main = command(PROGRAM, ProfileConfig, _profile, DESCRIPTION)
