"""The two conversions: a PyTorch file to a checkpoint, and a checkpoint to a PyTorch file."""

from __future__ import annotations

from pathlib import Path

from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.convert.reader import read_state, sha256
from hvit_jax.convert.state import config_of, detect, to_tree


def convert_file(source: str | Path, destination: str | Path, *, heads: int | None = None) -> None:
    """Convert a PyTorch file to a checkpoint.

    Args:
        source: a `.torch` or `.pth` file.
        destination: the folder to write; must not exist.
        heads: attention heads; None: those of the published size.
    """
    path = Path(source)
    state = read_state(path)
    layout, sizes = detect(str(source), {key: array.shape for key, array in state.items()})
    config = config_of(str(source), sizes, heads)
    parameters = to_tree(state, layout, config.depth)
    origin = {"file": path.name, "sha256": sha256(path), "format": layout.name}
    save_checkpoint(destination, parameters, Description(config, origin))
