"""`python -m hvit_jax.visualize`; see `hvit_jax.visualization`."""

import sys

from hvit_jax.visualization.cli import main

if __name__ == "__main__":
    sys.exit(main())
