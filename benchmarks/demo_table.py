"""Evaluate every method on the bundled demo and print the README's table.

`python benchmarks/demo_table.py` writes benchmarks/results/demo.json and prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import hvit_jax
from hvit_jax import demo
from hvit_jax.checkpoint import read_description
from hvit_jax.evaluation import EvalConfig, evaluate

RESULTS = Path(__file__).parent / "results" / "demo.json"
# Tight budgets, so that saving and loss both show; the others are the defaults.
OPTIONS = {"act": {"max_clusters": 64}, "ats": {"max_tokens": 80}, "smyrf": {"rounds": 8}}
COLUMNS = ("method", "options", "top-1 (%)", "GFLOPs", "tokens after the last block")


def measure(method: str) -> dict[str, Any]:
    """Evaluate one method on the demo.

    Args:
        method: a name in `hvit_jax.REDUCERS`.

    Returns:
        What `eval.py --output` writes, with the tokens after every block.
    """
    reducer = hvit_jax.make_reducer(method, **OPTIONS.get(method, {}))
    results = evaluate(EvalConfig(reducer=reducer))
    config = read_description(demo.checkpoint_dir()).config
    results["tokens"] = [layer.tokens_out for layer in reducer.resolve(config).schedule(config)]
    return {**results, "data": "demo", "checkpoint": "demo"}


def row(results: dict[str, Any]) -> str:
    """Format one method's results as a row of the table."""
    given = OPTIONS.get(results["method"], {})
    options = " ".join(f"{name}={value}" for name, value in given.items()) or "defaults"
    numbers = (f"{results['top1']:.1f}", f"{results['gflops']:.3f}", str(results["tokens"][-1]))
    return "| " + " | ".join((results["method"], options, *numbers)) + " |"


def main() -> None:
    """Measure all methods, write and print; there are no options but --help."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = [measure(method) for method in hvit_jax.REDUCERS]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---|---|" + "---:|" * 3)
    print("\n".join(map(row, rows)))


if __name__ == "__main__":
    main()
