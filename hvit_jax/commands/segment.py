"""`hvit segment`: segments of pictures, and how good they are; and what `hvit depth` shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hvit_jax.commands.flags import as_main, parse, value_of
from hvit_jax.dense.config import DepthConfig, SegmentConfig
from hvit_jax.dense.results import LIMITS, MOVED, read_results
from hvit_jax.dense.run import map_pictures
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.errors import InputError
from hvit_jax.evaluation.verify import print_verification, repeated
from hvit_jax.system.progress import plain_console

PROGRAM = "hvit segment"
DESCRIPTION = """Label every pixel of pictures with a Segmenter or another model with a decoder,
dense or under a token reduction method, on all devices of this machine; measure mIoU and speed, and
save the maps."""
DIFFERS = 1  # Exit status.


def make_main(
    program: str, record: type[SegmentConfig] | type[DepthConfig], description: str
) -> Callable[..., int]:
    """Make the main function of a command that maps pictures.

    Args:
        program: the command.
        record: its options.
        description: what it does, for `--help`.

    Returns:
        As `as_main`; its exit status is 1 if --verify finds differences.
    """

    def work(words: Sequence[str]) -> int:
        refuse_several(program)
        if (path := value_of("--verify", words, program)) is None:
            map_pictures(parse(record, words, program, description))
            return 0
        recorded = read_results(Path(path))  # Before --output may replace the file.
        task = recorded["task"]
        if recorded[LIMITS[task][0][0]] is None:
            raise InputError(f"{path} has no scores that could be compared")
        base = repeated(Path(path), recorded, record, program)
        config = parse(record, words, program, description, base=base)
        results, console = map_pictures(config), plain_console()
        held = print_verification(console, recorded, results, LIMITS[task], MOVED[task])
        return 0 if held else DIFFERS

    return as_main(work, program)


main = make_main(PROGRAM, SegmentConfig, DESCRIPTION)
