"""Conversion between files of weights in PyTorch's layouts and our checkpoints."""

from hvit_jax.convert.tasks import convert_file, export_file

__all__ = ["convert_file", "export_file"]
