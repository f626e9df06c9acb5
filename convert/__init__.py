"""`python -m convert SRC DST` from the repository's root; the code is in `hvit_jax.convert`."""
