"""Measure a checkpoint on labelled pictures; the work is in hvit_jax.evaluation."""

import sys

from hvit_jax.commands.eval import main

if __name__ == "__main__":
    sys.exit(main())
