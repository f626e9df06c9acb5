"""Entry point of `python -m hvit_jax.train`; the work is in hvit_jax.training."""

import sys

from hvit_jax.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
