"""Measure a checkpoint on labelled pictures: the command `hvit eval`."""

import sys

from hvit_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
