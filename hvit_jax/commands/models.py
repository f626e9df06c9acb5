"""The command `hvit models`."""

from __future__ import annotations

from hvit_jax.catalogue import ModelsConfig, list_models
from hvit_jax.commands.flags import command

PROGRAM = "hvit models"
DESCRIPTION = """List the models that --model NAME and hvit_jax.create(NAME) make: their pictures'
resolution, parameters, GFLOPs, and the weights that are usually taken, with their licence. Nothing
is downloaded."""

main = command(PROGRAM, ModelsConfig, list_models, DESCRIPTION)
