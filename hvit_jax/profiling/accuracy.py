"""Measured accuracies: results of evaluations, matched to the rows of a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvit_jax.errors import InputError
from hvit_jax.evaluation.verify import read_results
from hvit_jax.profiling.report import method_name

Row = dict[str, Any]
_CONFIGURATION = ("method", "model", "args", "resolution")


class Accuracies:
    """Top-1 of configurations, as evaluations measured it."""

    def __init__(self, files: Sequence[Path], checkpoint_sha256: str | None):
        """Read results that `eval.py --output` wrote.

        Args:
            files: one for each configuration.
            checkpoint_sha256: of the checkpoint that is timed; None where weights are random, which
                have the speed of any.

        Raises:
            InputError: if one cannot be read, is of another checkpoint, or two are of the same
                configuration or of different pictures.
        """
        self._found: dict[str, tuple[Path, Row]] = {}
        for path in files:
            self._add(path, read_results(path), checkpoint_sha256)

    def _add(self, path: Path, results: Row, checkpoint: str | None) -> None:
        if not all(name in results for name in _CONFIGURATION):
            raise InputError(f"{path} does not name its {', '.join(_CONFIGURATION)}")
        theirs = results.get("checkpoint_sha256")
        if checkpoint is not None and theirs not in (None, checkpoint):
            raise InputError(f"{path} is of another checkpoint: {results['checkpoint']}")
        for other, first in self._found.values():
            if first.get("data_sha256") != results.get("data_sha256"):
                raise InputError(f"{other} and {path} were scored on different pictures")
        key = _key(results)
        if key in self._found:
            raise InputError(f"{self._found[key][0]} and {path} are of the same configuration")
        self._found[key] = path, results

    def top1(self, row: Row) -> float | None:
        """Find the top-1 of a row's method, options, model and resolution, in per cent."""
        found = self._found.get(_key(row))
        return found and found[1]["top1"]

    def missing(self, rows: Sequence[Row]) -> list[str]:
        """Name the configurations of rows that no file has, each once."""
        names = [f"{row['model']} {method_name(row)}" for row in rows if self.top1(row) is None]
        return list(dict.fromkeys(names))


def published_top1(row: Row) -> float | None:
    """Find the published top-1 of a row's configuration, in per cent."""
    return (row["published"] or {}).get("top1")


def _key(row: Row) -> str:
    return json.dumps([row[name] for name in _CONFIGURATION], sort_keys=True)
