"""`hvit depth`: depth of pictures, and how far it is from the truth."""

from __future__ import annotations

from hvit_jax.commands.segment import make_main
from hvit_jax.dense.config import DepthConfig

PROGRAM = "hvit depth"
DESCRIPTION = """Estimate the depth of every pixel of pictures with a backbone and a depth head,
dense or under a token reduction method, on all devices of this machine; measure errors and speed,
and save the maps."""

main = make_main(PROGRAM, DepthConfig, DESCRIPTION)
