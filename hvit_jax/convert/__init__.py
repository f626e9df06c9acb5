"""Conversion between PyTorch's SWAG files and our checkpoints; needs the extra `convert`."""

from hvit_jax.convert.tasks import convert_file, export_file

__all__ = ["convert_file", "export_file"]
