"""Run the converter."""

import os
import signal
import sys


def _quit(*_):
    os.write(2, b"hvit convert: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    # JAX takes seconds to import, and swallows a KeyboardInterrupt that comes meanwhile.
    signal.signal(signal.SIGINT, _quit)
    from hvit_jax.commands.convert import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
