"""What the tests of merging methods share: who joined whom, as the golden numbers have it."""

import jax
import jax.numpy as jnp
import numpy as np

from hvit_jax.ops.selection import behind_prefix


def holdings(places):
    """Tell which tokens each new one holds: (B, M, N), 0 or 1."""
    tokens = int(jnp.max(places)) + 1
    return np.asarray(jax.nn.one_hot(places, tokens, axis=1))


def behind_class_token(places):
    """Turn places of patches into places of tokens, with CLS in front."""
    return behind_prefix(places, 1)
