"""Measure a checkpoint on labelled pictures; the work is in hvit_jax.evaluation."""

import signal
import sys

if __name__ == "__main__":
    # While JAX is imported, Python's handler of Ctrl-C would print a traceback or be ignored.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from hvit_jax.commands.eval import main

    signal.signal(signal.SIGINT, handler)
    sys.exit(main())
