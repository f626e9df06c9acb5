"""The demo's comparison, measured in minutes by `python docs/comparison.py`.

docs/demo-comparison.html            the report
benchmarks/results/comparison.json   what is in it
docs/choosing.png                    what agreement with the dense model says of the accuracy lost

`--draw` only writes report and plot anew, of rows that are there. Either way it prints the
correlations that docs/choosing.md has.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scipy.stats import spearmanr

from hvit_jax.comparing import CompareConfig, compare
from hvit_jax.comparing.rows import Trial, at_level
from hvit_jax.comparing.verify import read_comparison
from hvit_jax.system.figures import new_figure, pyplot, save_figure

FOLDER = Path(__file__).parent
REPORT = FOLDER / "demo-comparison.html"
RESULTS = FOLDER.parent / "benchmarks" / "results" / "comparison.json"
PLOT = FOLDER / "choosing.png"
LEVELS = (0.8, 0.6, 0.4)


def main() -> None:
    """Measure, unless only the plot is wanted, and draw."""
    if not (resume := "--draw" in sys.argv):
        RESULTS.unlink(missing_ok=True)
    options = {"pictures": 1000, "seconds": 0.3, "levels": LEVELS, "resume": resume}
    compare(CompareConfig(**options, output=(RESULTS, REPORT)))
    rows = [row for row in read_comparison(RESULTS)[1] if row.error is None]
    reduced = [row for row in rows if row.method != "dense"]
    print(f"{'':24}agreement  KL divergence")
    for name, part in {
        "all settings": reduced,
        **{f"at {level:g} of the cost": at_level(rows, level) for level in LEVELS},
    }.items():
        lost = [row.loss for row in part]
        ranks = [
            spearmanr([sign * of(row, score) for row in part], lost).statistic
            for score, sign in (("agreement", -1), ("kl", 1))
        ]
        print(f"{name:20}{len(part):4}{ranks[0]:9.2f}{ranks[1]:15.2f}")
    gaps = [100 - of(row, "agreement") - row.loss for row in reduced]
    print(f"100 - agreement is {min(gaps):.1f} to {max(gaps):.1f} points more than what is lost")
    draw(reduced)


def of(row: Trial, name: str) -> float:
    """Give a score of a row."""
    return row.scores[name]["value"]


def draw(rows: list[Trial]) -> None:
    """Draw what every setting loses against how far it agrees with dense, and diverges from it."""
    figure, panels = new_figure(2, width=5.5)
    colours = pyplot().get_cmap("tab20")
    for place, method in enumerate(dict.fromkeys(row.method for row in rows)):
        here = [row for row in rows if row.method == method]
        style = {"color": colours(place % 20), "marker": "x" if here[0].is_baseline else "o"}
        for panel, name in zip(panels, ("agreement", "kl"), strict=True):
            xs, ys = [of(row, name) for row in here], [row.loss for row in here]
            panel.plot(xs, ys, ls="none", ms=5, label=method, **style)
    least = min(of(row, "agreement") for row in rows)
    panels[0].plot([least, 100], [100 - least, 0], ":", color="0.4", label="100 - agreement")
    panels[0].set(xlabel="pictures of the dense model's class (%)", ylabel="top-1 lost (points)")
    panels[0].invert_xaxis()
    panels[1].set(xlabel="KL divergence from dense (nats)", xscale="log")
    for panel in panels:
        panel.grid(alpha=0.3)
    panels[1].plot([], [], ":", color="0.4", label="100 - agreement")
    panels[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=8)
    save_figure(figure, PLOT, dpi=100)


if __name__ == "__main__":
    main()
