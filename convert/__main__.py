"""Run the converter: the command `hvit convert`."""

import sys

from hvit_jax.commands.main import program

if __name__ == "__main__":
    program(["convert", *sys.argv[1:]])
