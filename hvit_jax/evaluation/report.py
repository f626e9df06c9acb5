"""What an evaluation prints at its end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_ROWS = (
    ("top-1 (%)", "top1", "{:.2f}"),
    ("top-5 (%)", "top5", "{:.2f}"),
    ("loss", "loss", "{:.4f}"),
    ("images", "images", "{:d}"),
    ("images/s", "images_per_second", "{:.1f}"),
    ("waiting for pictures", "input_wait", "{:.1%}"),
    ("GFLOPs (tables' convention)", "gflops", "{:.3f}"),
)
_PUBLISHED_NAMES = {"images_per_second": "throughput"}
_SKIPPED_SHOWN = 10


def print_report(console: Console, results: dict[str, Any]) -> None:
    """Print the final table, beside the published row if the configuration is one.

    Args:
        console: where to.
        results: as `results.json` has them.
    """
    published = (results["published"] or {}).get("published", {})
    table = Table()
    table.add_column("")
    table.add_column("partial" if results["partial"] else "measured", justify="right")
    if published:
        table.add_column("published (V100, float32)", justify="right")
    for label, name, form in _ROWS:
        row = [label, _show(results.get(name), form)]
        if published:
            row.append(_show(published.get(_PUBLISHED_NAMES.get(name, name)), "{}"))
        table.add_row(*row)
    for name, total in results["report"].items():
        table.add_row(name.replace("_", " "), f"{total:g}")
    console.print(describe(results), soft_wrap=True)
    console.print(table)
    _print_warnings(console, results)


def describe(results: dict[str, Any]) -> str:
    """Name a configuration in a few words."""
    arguments = ", ".join(f"{name}={value}" for name, value in results["args"].items())
    size = results["resolution"]
    shape = "x".join(map(str, size if isinstance(size, list) else [size, size]))
    method = f"{results['method']}({arguments})" if arguments else results["method"]
    count = results.get("devices", 1)
    devices = f"{count} x {results['device']}" if count > 1 else results["device"]
    return f"{method}, {results['model']} at {shape}, {results['dtype']}, {devices}"


def _show(value: Any, form: str) -> str:
    if value is None:
        return ""
    text = form.format(value)
    return text if value == 0 or "%" in text or float(text) else f"{value:.2g}"


def _print_warnings(console: Console, results: dict[str, Any]) -> None:
    skipped, broken = results["skipped"], results["not_finite"]
    if skipped:
        console.print(f"left out {len(skipped)} that cannot be read:")
        for problem in skipped[:_SKIPPED_SHOWN]:
            console.print(f"  {problem}", soft_wrap=True)
        if len(skipped) > _SKIPPED_SHOWN:
            console.print(f"  and {len(skipped) - _SKIPPED_SHOWN} more; --output lists all")
    if broken:
        console.print(
            f"{broken} pictures gave logits that are not finite numbers; they count as wrong",
            soft_wrap=True,
        )
