"""Run the converter."""

import sys

if __name__ == "__main__":
    try:
        from hvit_jax.convert.cli import main
    except KeyboardInterrupt:  # JAX takes seconds to import.
        print("hvit-convert: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
