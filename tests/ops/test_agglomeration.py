"""Agglomerative clustering, against SciPy's and the golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from hvit_jax.ops import agglomeration
from hvit_jax.ops.agglomeration import cosine_distances
from tests.golden import Goldens

agglomerate = jax.jit(agglomeration.agglomerate, static_argnames=("joins", "linkage"))


def by_first_member(labels):
    """Number the clusters of one image in ascending order of their first patches."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


@pytest.mark.parametrize("name", Goldens().cases("atc"))
def test_parity_clusters(name, goldens):
    case = goldens.case(name)
    distances = cosine_distances(jnp.asarray(case["metric"])[:, 1:])
    joins = int(case["removed"])
    found = agglomerate(distances, joins=joins, linkage=name.split("_")[1])
    np.testing.assert_array_equal(found + 1, case["labels"][:, 1:])


@pytest.mark.parametrize("method", ["average", "complete", "single"])
def test_clusters_against_scipy(method):
    points = np.random.default_rng(0).normal(size=(3, 23, 4)).astype(np.float32)
    distances = cosine_distances(jnp.asarray(points))
    found = agglomerate(distances, joins=17, linkage=method)
    for each, labels in zip(np.asarray(distances, np.float64), found, strict=True):
        np.fill_diagonal(each, 0)
        tree = linkage(squareform(each, checks=False), method)
        np.testing.assert_array_equal(labels, by_first_member(cut_tree(tree, 6)[:, 0]))


def test_none_and_all_joined():
    distances = cosine_distances(jnp.eye(4)[None])
    assert agglomerate(distances, joins=0)[0].tolist() == [0, 1, 2, 3]
    assert agglomerate(distances, joins=3)[0].tolist() == [0, 0, 0, 0]


def test_of_equal_distances_the_first_pair_is_joined():
    distances = cosine_distances(jnp.eye(5)[jnp.array([[4, 0, 1, 0, 1]])])
    assert agglomerate(distances, joins=1)[0].tolist() == [0, 1, 2, 1, 3]
    assert agglomerate(distances, joins=2)[0].tolist() == [0, 1, 2, 1, 2]
