"""Rows of the published tables, and full-size models without weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import hvit_jax
from hvit_jax.api import with_resolution
from hvit_jax.architectures import named_config

PUBLISHED = json.loads((Path(hvit_jax.__file__).parent / "published.json").read_text())["rows"]


def published(method):
    """All rows of one method, as test parameters."""
    return [row for row in PUBLISHED if row["method"] == method]


def row_name(row):
    return "-".join([row["model"], *(f"{key}={value}" for key, value in row["args"].items())])


def row_config(row):
    return with_resolution(named_config(row["model"]), tuple(row["resolution"]))


def token_counts(config, reducer):
    """Trace a full-size model on abstract arrays; list the tokens after every block."""
    model = nnx.eval_shape(lambda: hvit_jax.models.ViT(config, reducer, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, *config.image_shape, 3), jnp.float32)
    run = lambda state, images: nnx.merge(graph, state).features(images).tokens  # noqa: E731
    return [tokens.shape[1] for tokens in jax.eval_shape(run, state, images)]
