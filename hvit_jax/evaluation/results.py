"""What an evaluation writes: `results.json` and the predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hvit_jax.costs import count_flops
from hvit_jax.evaluation.inputs import Inputs
from hvit_jax.evaluation.tally import Rows, Tally, join_rows
from hvit_jax.models.vit import ViT
from hvit_jax.published import describe_configuration, find_published
from hvit_jax.system.files import write_atomically
from hvit_jax.system.provenance import describe_runtime


def describe_model(model: ViT) -> dict[str, Any]:
    """Describe what runs, and on what, in the form that `results.json` has.

    Args:
        model: the model.

    Returns:
        Method, resolved arguments, model, resolution, dtype, GFLOPs in the tables' convention, the
        published row or None, device and versions.
    """
    return {
        **describe_configuration(model.config, model.reducer),
        "dtype": model.dtype.name,
        "gflops": count_flops(model.config, model.reducer) / 1e9,
        "published": find_published(model.config, model.reducer),
        **describe_runtime(),
    }


def scores(tally: Tally) -> dict[str, Any]:
    """Give the results so far, in the form that `results.json` has.

    Args:
        tally: what has been scored.

    Returns:
        Accuracies in per cent, mean loss, counts, steady speed, share of the time spent waiting for
        pictures; None where there is no number.
    """
    totals = tally.totals
    return {
        "top1": totals.percent(totals.correct),
        "top5": totals.percent(totals.correct_top5),
        "loss": totals.mean(totals.loss),
        "images": totals.images,
        "images_per_second": totals.images_per_second,
        "input_wait": tally.input_wait,
        "not_finite": totals.not_finite,
        "skipped": tally.skipped,
        "report": totals.report,
    }


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json` atomically.

    Raises:
        InputError: if it cannot be written.
    """
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save_predictions(path: Path, tally: Tally, inputs: Inputs) -> None:
    """Write the scored pictures' `paths`, `labels`, `logits` and `top1`, in the source's order.

    Args:
        path: the .npz file, replaced atomically.
        tally: what has been scored; it kept its logits.
        inputs: the pictures and the classes.

    Raises:
        InputError: if it cannot be written.
    """
    paths, classes = inputs.source.paths, inputs.description.config.num_classes
    # An empty part keeps shapes and types where nothing was scored.
    none = np.zeros(0, np.int32)
    rows = join_rows([Rows(none, none, none, np.zeros((0, classes), np.float32), ()), *tally.rows])
    arrays = {
        "paths": np.array([paths[index] for index in rows.indices], np.str_),
        **{name: getattr(rows, name) for name in ("labels", "top1", "logits")},
    }
    write_atomically(path, lambda file: np.savez(file, **arrays))
