"""The version of hvit_jax, in one place."""

__version__ = "0.2.0"
