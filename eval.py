"""Measure a checkpoint on labelled pictures: the command `hvit eval`."""

import sys

from hvit_jax.commands.main import program

if __name__ == "__main__":
    program(["eval", *sys.argv[1:]])
