"""`hvit visualize`: pictures of what a method does with a picture's patches."""

from __future__ import annotations

from hvit_jax.commands.flags import command
from hvit_jax.visualization import VisualizeConfig, visualize

PROGRAM = "hvit visualize"
DESCRIPTION = """Draw which patches of a picture a method treats as one: groups in their mean
colour with outlines, dropped patches dark, and what CLS attends to as a heat map (without CLS,
what all patches attend to on average). Without --checkpoint the bundled demo's model looks at the
pictures; -r 128 gives it 32 x 32 patches. For act and smyrf, which keep all tokens, the groups are
those of the queries in the first head."""


def _visualize(config: VisualizeConfig) -> None:
    visualize(config)
    print(f"written: {config.output}")


main = command(PROGRAM, VisualizeConfig, _visualize, DESCRIPTION)
