"""Maps in figures: their columns, and where two differ."""

import dataclasses

import numpy as np

from hvit_jax import demo
from hvit_jax.config import Decoder, ViTConfig
from hvit_jax.reducers import make_reducer
from hvit_jax.visualization import VisualizeConfig, visualize
from hvit_jax.visualization.maps import draw_maps
from tests.evaluation_setup import make_checkpoint

PICTURE = np.full((4, 8, 3), 100, np.uint8)


def test_where_the_classes_differ():
    dense = np.zeros((2, 4, 3))
    dense[..., 1] = 1
    reduced = dense.copy()
    reduced[0, 0, 2] = 2
    columns = dict(draw_maps([PICTURE], [dense], [reduced], "tome"))
    assert list(columns) == ["map, dense", "map, tome", "they differ: 12.5 % of pixels"]
    (marked,) = columns["they differ: 12.5 % of pixels"]
    changed = (marked != 100).any(-1)
    assert changed[:2, :2].all() and changed.sum() == 4  # One of eight places, enlarged twice.


def test_how_far_depths_are_apart():
    dense, reduced = np.ones((2, 4, 1)), np.ones((2, 4, 1))
    reduced[1, 3] = 1.5
    *_, (title, (drawn,)) = draw_maps([PICTURE], [dense], [reduced], "tome")
    assert title == "apart by up to 0.5 m" and drawn.shape == PICTURE.shape
    assert drawn[3, 7, 0] > drawn[0, 0, 0]


def test_a_figure_of_a_model_that_makes_maps(tmp_path):
    config = ViTConfig(32, 8, 2, 16, 2, 32, num_classes=0, decoder=Decoder("linear", 3))
    make_checkpoint(tmp_path / "maps", config)
    picture = str(demo.pictures_dir() / "coffee.jpg")
    asked = VisualizeConfig(
        images=(picture,),
        output=tmp_path / "maps.png",
        checkpoint=tmp_path / "maps",
        reducer=make_reducer("hourglass", cluster_location=1, num_clusters=4),
        after=(1,),
        cache=False,
    )
    (row,) = visualize(asked)
    titles = [panel.title for panel in row]
    assert titles[-3:-1] == ["map, dense", "map, hourglass"] and "of pixels" in titles[-1]
    assert len({panel.drawing.shape for panel in row}) == 1
    dense = dataclasses.replace(asked, reducer=make_reducer("dense"))
    assert visualize(dense)[0][-1].title == "they differ: 0.0 % of pixels"
