"""What `model.json` says of a converted model beside its sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvit_jax.checkpoint import Description
from hvit_jax.convert.detect import Found
from hvit_jax.convert.facts import Facts
from hvit_jax.convert.families import family_of, preprocessing_of, without_rest
from hvit_jax.convert.heads import windows_of
from hvit_jax.convert.reader import StateDict
from hvit_jax.errors import InputError
from hvit_jax.pictures import Preprocessing


def describe(
    read: StateDict,
    file: str,
    found: Found,
    facts: Facts | None,
    own: Description | None,
    preprocessing: str | None,
) -> Description:
    """Say where a model came from, what was left out or assumed, and how pictures are prepared.

    Args:
        read: the state dict.
        file: its name.
        found: the model in it.
        facts: what a folder's files say beside it.
        own: what `export_file` wrote beside it.
        preprocessing: the user's choice.

    Raises:
        InputError: if the choice is not known, or one is needed.
    """
    form, config, known = found.form, found.config, own or facts
    passed = [*read.said.get("ignored", ()), *found.ignored]
    prepared, guessed = _prepared(file, found, facts, own, preprocessing)
    classes, outputs = known.classes if known is not None else (), config.num_classes
    data_set, windows = windows_of(config)
    if config.decoder is not None:
        prepared = dataclasses.replace(prepared, crop_pct=1.0)  # Maps are of whole pictures.
        classes, outputs = own.classes if own else (), config.decoder.outputs
    if own is not None and own.config.decoder is not None:
        windows = own.windows
    elif facts is not None and facts.windows is not None:
        windows = facts.windows
    if classes and outputs and len(classes) != outputs:
        passed.append(f"{len(classes)} names of classes, for {outputs} outputs")
    said = {name: each for name, each in read.said.items() if name not in ("chunks", "ignored")}
    more = {
        "ignored": passed,
        "form": form.as_json(),
        "assumed": ", ".join(filter(None, (*found.assumed.values(), guessed))),
        "data_set": data_set,
        **(_said_beside(facts) if facts else {}),
        **(own.source if own else {}),
    }
    return Description(
        config,
        {
            **{"file": file, "sha256": read.sha256, "format": form.layout.name, **said},
            **{key: value for key, value in more.items() if value},
        },
        classes if len(classes) == outputs else (),
        prepared,
        windows,
    )


def _prepared(
    file: str,
    found: Found,
    facts: Facts | None,
    own: Description | None,
    preprocessing: str | None,
) -> tuple[Preprocessing, str]:
    """Find how pictures are prepared, and what was guessed of that; "": nothing."""
    config, known = found.config, own or facts
    family = family_of(found.form.layout, config, file)
    name, usual = preprocessing_of(preprocessing, file, family, config)
    if preprocessing is not None:
        return usual, ""
    if known is not None and known.preprocessing is not None:
        if facts is None or facts.input_size is not None:
            return known.preprocessing, ""
        # Pictures of the model's own size.
        stated = facts.switches.get("resolution", config.image_shape)
        return without_rest(known.preprocessing, stated, config), ""
    if facts is not None and "normalization" in facts.notes:
        raise InputError(
            f"{facts.file} says normalization {facts.notes['normalization']}, which is not vit or "
            "deit; say whose mean and deviation the model takes with --preprocessing segmenter-vit "
            "or segmenter-deit (in Python: preprocessing=)"
        )
    return usual, "" if family == "SWAG" else f"preprocessing of {name}"


def _said_beside(facts: Facts) -> dict[str, Any]:
    """Note what a folder's files say that is no part of the model."""
    notes = {"architecture": facts.notes.get("architecture"), "note": facts.notes.get("pictures")}
    if facts.windows is not None:  # Else the number of classes may tell.
        notes["data_set"] = facts.notes.get("data_set")
    return {**notes, "input_size": facts.input_size, "licence": facts.licence}
