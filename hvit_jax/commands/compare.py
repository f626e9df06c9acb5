"""`hvit compare`: methods compared on your pictures and device, and the setting to use."""

from __future__ import annotations

from collections.abc import Sequence

from hvit_jax.commands.flags import as_main, parse, value_of
from hvit_jax.comparing import CompareConfig, compare
from hvit_jax.comparing.run import PROGRAM
from hvit_jax.comparing.verify import recorded_config, verify

DESCRIPTION = """Compare methods on a sample of your pictures, on all devices of this machine, at
several shares of the dense model's cost, beside the dense model and dense at a lower resolution:
accuracy or mIoU, or agreement with dense where there are no labels, speed and memory; and name the
setting to use. Without DATA and --checkpoint it compares them on the bundled demo."""
FAILS = 1  # Exit status: no setting reaches the goal, or a file's scores are not found again.


def _main(words: Sequence[str]) -> int:
    base = None
    if (path := value_of("--verify", words, PROGRAM)) is not None:
        base = recorded_config(path)
    config = parse(CompareConfig, words, PROGRAM, DESCRIPTION, base=base)
    if config.verify is not None:
        return 0 if verify(config) else FAILS
    done = compare(config)
    asked = config.target_speedup is not None or config.max_drop is not None
    return FAILS if asked and not done.reached else 0


main = as_main(_main, PROGRAM)
