"""Measuring the scores of a file again: `hvit compare --verify compare.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from hvit_jax.comparing.config import CompareConfig
from hvit_jax.comparing.opening import open_comparison
from hvit_jax.comparing.rows import Trial, measured
from hvit_jax.comparing.scores import SCORES
from hvit_jax.comparing.trials import Trials
from hvit_jax.errors import InputError
from hvit_jax.evaluation.verify import LOSS, POINTS, print_changes
from hvit_jax.fields import from_json
from hvit_jax.system.files import read_json
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, show_progress
from hvit_jax.system.provenance import FINGERPRINTS
from hvit_jax.system.signals import sigterm_raises

_SAME = (*FINGERPRINTS, "pictures", "bootstrap")
# What does not come from the file.
_NOT_REPEATED = ("workers", "output", "resume", "verify")


def read_comparison(path: Path) -> tuple[dict[str, Any], list[Trial]]:
    """Read what `hvit compare --output` wrote: all of it, and its rows.

    Raises:
        InputError: if it is no such file.
    """
    content = read_json(path)
    try:
        rows = [Trial(**row) for row in content["rows"]]
        if not content["config"].keys() >= {"methods", "levels"} or not rows:
            raise KeyError("the configuration of a comparison")
    except (KeyError, TypeError, AttributeError) as error:
        what = "no comparison, as hvit compare --output writes it"
        raise InputError(f"{path} holds {what}") from error
    return content, rows


def recorded_config(name: str) -> CompareConfig:
    """Make the record of the comparison in a file, to be verified.

    Raises:
        InputError: if it is none, or has options that no comparison has.
    """
    path = Path(name)
    content, _ = read_comparison(path)
    options = {key: each for key, each in content["config"].items() if key not in _NOT_REPEATED}
    try:
        return from_json(CompareConfig, options, verify=path)
    except InputError as error:
        raise InputError(f"{path} has options that hvit compare does not write: {error}") from error


def verify(
    config: CompareConfig, *, console: Console | None = None, messages: Console | None = None
) -> bool:
    """Measure the scores of all rows in the file `config.verify` again; speeds are not compared.

    Args:
        config: how, as `recorded_config` makes it.
        console: where differences are printed; default: stdout.
        messages: where progress goes; default: stderr.

    Returns:
        Whether all are found again, as far as rounding allows.

    Raises:
        InputError: as `compare`.
    """
    assert config.verify is not None
    console, messages = console or plain_console(), messages or plain_console(stderr=True)
    content, rows = read_comparison(config.verify)
    use_compilation_cache(config.cache)
    opened = open_comparison(config, messages)
    print_changes(console, content, opened.about)
    found = [
        f"{name} was {content.get(name)} and is {opened.about[name]}"
        for name in _SAME
        if name in opened.about and content.get(name) != opened.about[name]
    ]
    trials = Trials(opened.bench, None)
    rows = measured(rows)
    with sigterm_raises(), show_progress(messages, len(rows), unit="settings") as show:
        for number, row in enumerate(rows, 1):
            found += differences(row, trials.measure(row.setting(opened.bench.sizes)))
            show(number, row.name)
    for line in found:
        console.print(f"differs: {line}")
    if not found:
        console.print(
            f"verified: the scores of {len(rows)} settings on {len(opened.pictures)} pictures"
        )
    return not found


def differences(row: Trial, again: Trial) -> list[str]:
    """Say what differs between a row and itself, measured again, by more than rounding explains."""
    found = [
        f"{row.name}: {name} was {getattr(row, name):g} and is {getattr(again, name):g}"
        for name in ("cost", "gflops")
        if abs(getattr(row, name) - getattr(again, name)) > 1e-9 * getattr(again, name)
    ]
    if list(row.scores) != list(again.scores):
        return [*found, f"{row.name}: scores were {', '.join(row.scores) or 'none'}"]
    for name, before in row.scores.items():
        now, score = again.scores[name], SCORES[name]
        room = POINTS if score.in_percent else LOSS * abs(now["value"])
        for part in ("value", "interval", "change", "change_interval"):
            pairs = zip(_listed(before.get(part)), _listed(now[part]), strict=False)
            if any(not abs(old - new) <= room + 1e-6 for old, new in pairs):
                shown = (", ".join(map(score.form.format, _listed(x[part]))) for x in (before, now))
                found.append("{}: {} of {} was {} and is {}".format(row.name, part, name, *shown))
    return found


def _listed(value: Any) -> list[float]:
    return value if isinstance(value, list) else [float("nan") if value is None else value]
