"""Draw the documentation's figures: `python docs/figures.py` writes docs/figures/*.jpg."""

from __future__ import annotations

from pathlib import Path

from hvit_jax import REDUCERS, demo, make_reducer
from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.costs import at_cost
from hvit_jax.visualization import VisualizeConfig, visualize
from hvit_jax.visualization.config import SHARE

FOLDER = Path(__file__).parent / "figures"
PHOTOGRAPHS = tuple(sorted(str(path) for path in demo.pictures_dir().glob("*.jpg")))
RESOLUTION = 128


def main() -> None:
    """Draw all of them."""
    every = {"images": PHOTOGRAPHS[::2], "resolution": RESOLUTION, "compare": True}
    visualize(VisualizeConfig(**every, output=FOLDER / "compare.jpg"))
    config = with_resolution(read_description(demo.checkpoint_dir()).config, RESOLUTION)
    for method in REDUCERS:
        if method != "dense":
            visualize(
                VisualizeConfig(
                    images=PHOTOGRAPHS[::2],
                    output=FOLDER / f"{method}.jpg",
                    reducer=at_cost(method, config, SHARE),
                    resolution=RESOLUTION,
                )
            )
    options = {"cluster_location": 2, "num_clusters": 256, "keep_rate": 0.5, "chain_at": 3}
    visualize(
        VisualizeConfig(
            images=PHOTOGRAPHS[::2],
            output=FOLDER / "chain.jpg",
            reducer=make_reducer("hourglass+evit", **options, drop_locations=(0, 1)),
            resolution=RESOLUTION,
        )
    )


if __name__ == "__main__":
    main()
