"""Run the converter: the command `hvit convert`."""

import sys

from hvit_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
