"""`python -m hvit_jax`: the program `hvit`."""

import sys

from hvit_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
