"""Token clustering and reconstruction of Hourglass (Liang et al. 2022, arXiv 2210.01035)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hvit_jax.errors import InputError
from hvit_jax.ops.arrays import pad_end, softmax
from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accumulator, accurate_einsum, rounded

# Of the automatic temperature of clustering: measured on several models, see
# docs/methods/hourglass.md; half or twice as much serves about as well.
TIGHTNESS = 8.0


def pooling_matrix(size: int, out: int) -> np.ndarray:
    """Adaptive average pooling along one axis as a matrix.

    Args:
        size: entries before.
        out: entries after; window `i` covers floor(i * size / out) to ceil((i + 1) * size / out).

    Returns:
        Float32 weights of shape (out, size), rows sum to 1.
    """
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def initial_labels(grid: tuple[int, int], clusters: tuple[int, int]) -> np.ndarray:
    """Assign each patch to the centroid of its place: nearest-neighbour upsampling.

    Args:
        grid: rows and columns of patches, h x w.
        clusters: rows and columns of centroids, kh x kw.

    Returns:
        Int labels of shape (h * w, 2): centroid row and column of every patch.
    """
    axes = [np.arange(size) * out // size for size, out in zip(grid, clusters, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def window_mask(grid: tuple[int, int], clusters: tuple[int, int], window: int) -> np.ndarray:
    """Mark the centroids that each patch may join: those within a window around its own.

    Args:
        grid: rows and columns of patches.
        clusters: rows and columns of centroids.
        window: side of the window in centroids.

    Returns:
        Bools of shape (patches, centroids).
    """
    labels = initial_labels(grid, clusters)[:, None, :]
    places = np.stack(np.meshgrid(*map(np.arange, clusters), indexing="ij"), -1).reshape(1, -1, 2)
    return np.all(np.abs(labels - places) <= window // 2, axis=-1)


def pool_tokens(
    x: Float[Array, "B P C"], *, grid: tuple[int, int], clusters: tuple[int, int]
) -> Float[Array, "B K C"]:
    """Average the patches of each cell: the first centroids, in float32."""
    return _divided(*_sum_cells(x, grid, clusters, math.prod(clusters)))


def _sum_cells(x, grid, clusters, count) -> tuple[Float[Array, "B K C"], Float[Array, "B K"]]:
    """Sum the patches of each cell, and count them; or give their mean, and 1.

    On a GPU there may be rows of zeros behind the patches, and `count` be more than the cells.
    """
    rows, columns = (pooling_matrix(*sizes) for sizes in zip(grid, clusters, strict=True))
    (batch, patches, width), dtype = x.shape, accumulator(x.dtype)
    if backend() == "gpu" and x.dtype != dtype:
        # Products of 16 bits by 0 and 1 are exact. One of both axes reads patches as they are.
        inside = np.kron(rows > 0, columns > 0)
        spare = count - inside.shape[0], patches - inside.shape[1]
        inside = np.pad(inside, [(0, each) for each in spare])
        members = jnp.broadcast_to(jnp.asarray(inside, x.dtype), (batch, *inside.shape))
        total = jnp.broadcast_to(jnp.asarray(inside.sum(1), dtype), members.shape[:2])
        return accurate_einsum("bkp,bpc->bkc", members, x), total
    cells = x.astype(dtype).reshape(batch, *grid, width)
    pooled = accurate_einsum("kh,lw,bhwc->bklc", rows, columns, cells).reshape(batch, -1, width)
    pooled = pad_end(pooled, count - pooled.shape[1], axis=1)
    return pooled, jnp.ones(pooled.shape[:2], dtype)


def _divided(sums, total):
    return sums / jnp.maximum(total, 1e-16)[..., None]


def closeness(x: Float[Array, "B P C"], centroids: Float[Array, "B K C"]) -> Float[Array, "B P K"]:
    """Negative squared distance of each patch to each centroid, plus the patch's squared norm.

    The norm is the same for all centroids, so it changes neither a softmax nor an argmax over them;
    leaving it out keeps the numbers small and exact. Centroids are rounded as patches are, for
    their own norm too: else the difference of two large numbers would hold the rounding of one.
    """
    centroids = rounded(centroids.astype(accumulator(centroids.dtype)), x.dtype)
    products = accurate_einsum("bpc,bkc->bpk", x, centroids.astype(x.dtype))
    return 2 * products - jnp.square(centroids).sum(-1)[:, None, :]


def scale_free_temperature(
    x: Float[Array, "B P C"], scores: Float[Array, "B P K"]
) -> Float[Array, "B 1 1"]:
    """Measure the temperature at which a picture's patches are 1 from their nearest centroids.

    It is 1 / their mean squared distance, so that tokens s times as large get 1 / s^2 of it, and
    the same weights.

    Args:
        x: patches.
        scores: their `closeness` to centroids; -inf for those that they may not join.
    """
    norms = jnp.square(x.astype(scores.dtype)).sum(-1)
    distance = (norms - scores.max(-1)).mean(-1)
    # Where patches equal their centroids, distances are roundings, which shall not become large.
    least = 1e-6 * norms.mean(-1) + 1e-30
    return jax.lax.stop_gradient(1 / jnp.maximum(distance, least))[:, None, None]


def cluster_tokens(
    x: Float[Array, "B P C"],
    *,
    grid: tuple[int, int],
    clusters: tuple[int, int],
    window: int = 5,
    iters: int = 5,
    temperature: float | str = 1.0,
    places: Float[Array, "b P 2"] | None = None,
) -> tuple[Float[Array, "B K C"], Float[Array, "B K 2"] | None]:
    """Cluster a grid of patch tokens to a grid of centroids by local soft k-means.

    Args:
        x: patch tokens, row-major over the grid.
        grid: rows and columns of patches; P is their product.
        clusters: rows and columns of centroids; K is their product.
        window: a patch may join only centroids within `window // 2` rows and columns of its own.
        iters: k-means iterations.
        temperature: factor on the negative squared distance in the softmax over centroids. "auto":
            `TIGHTNESS` times the `scale_free_temperature` of the first centroids.
        places: coordinates of the patches, of which each centroid takes the same mean as of them.

    Returns:
        Centroids in float32, row-major over the cluster grid, and their coordinates, or None.
    """
    mask, factor = window_mask(grid, clusters, window), temperature
    if isinstance(factor, str):
        first = pool_tokens(x, grid=grid, clusters=clusters)
        within = jnp.where(jnp.asarray(mask)[None], closeness(x, first), -jnp.inf)
        factor = TIGHTNESS * scale_free_temperature(x, within)
    patches, cells = mask.shape
    if backend() == "gpu" and x.dtype != accumulator(x.dtype):
        # cuBLAS wants rows by the eight: else XLA would fill up the operands of every product.
        # Rows of zeros add nothing; cells that no patch may join stay 0.
        x = pad_end(x, -patches % 8, axis=1)
        mask = np.pad(mask, ((0, -patches % 8), (0, 0)), mode="edge")
        mask = np.pad(mask, ((0, 0), (0, -cells % 8)))
    allowed = jnp.asarray(mask)[None]

    def affinity(sums, total):
        scores = jnp.where(allowed, factor * closeness(x, _divided(sums, total)), -jnp.inf)
        # The weights are rounded before they are summed, so that they still average exactly.
        # Behind the barrier nothing reads them unrounded, and a GPU writes them in 16 bits only.
        return jax.lax.optimization_barrier(softmax(scores).astype(x.dtype))

    def sums_of(weights, values):
        # Divided where they are read, they are not written and read once more.
        total = weights[:, :patches].sum(1, dtype=accumulator(x.dtype))
        return accurate_einsum("bpk,bpc->bkc", weights, values), total

    def update(_, carry):
        return sums_of(affinity(*carry), x)

    start = _sum_cells(x, grid, clusters, mask.shape[1])
    if places is None:
        return _divided(*jax.lax.fori_loop(0, iters, update, start))[:, :cells], None
    weights = affinity(*jax.lax.fori_loop(0, iters - 1, update, start))
    centroids = _divided(*sums_of(weights, x))[:, :cells]
    weights = weights[:, :patches, :cells].astype(places.dtype)
    places = jnp.broadcast_to(places, (x.shape[0], *places.shape[1:]))
    return centroids, _divided(*sums_of(weights, places))


def cluster_labels(x: Float[Array, "B P C"], centroids: Float[Array, "B K C"]) -> Int[Array, "B P"]:
    """Find each patch's nearest centroid, over all of them and not only its window."""
    return closeness(x, centroids).argmax(-1).astype(jnp.int32)


def reconstruct_tokens(
    before: Float[Array, "B P C"],
    centroids: Float[Array, "B K C"],
    tokens: Float[Array, "B K E"],
    *,
    k: int = 3,
    temperature: float | str = 0.05,
    normalize: str = "l2",
) -> Float[Array, "B P E"]:
    """Spread processed centroids over the grid of patches.

    Each patch takes a weighted sum of the `k` centroids nearest to it, with weights
    `exp(-temperature * squared distance)`.

    Args:
        before: patch features before clustering.
        centroids: centroids right after clustering, in the same space as `before`.
        tokens: the centroids after later blocks.
        k: neighbours; ties with the k-th are kept; negative keeps all.
        temperature: factor on the negative squared distance; "auto": `scale_free_temperature`.
        normalize: "l2" scales a patch's weights to unit L2 norm, as the original does; "sum" makes
            them sum to 1, as the paper writes.

    Returns:
        Features for every patch, in the dtype of `tokens`.

    Differs from the original: weights are taken relative to the nearest centroid's, which the
    normalisation cancels, so that they do not underflow for distant centroids.
    """
    scores = closeness(before, centroids)
    automatic = isinstance(temperature, str)
    factor = scale_free_temperature(before, scores) if automatic else temperature
    scores = factor * scores
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    if normalize not in ("l2", "sum"):
        raise InputError(f"normalize must be 'l2' or 'sum', got {normalize!r}")
    if k == 0:
        raise InputError("k must be at least 1, or negative to keep all centroids; got 0")
    if 0 < k < weights.shape[-1]:
        # Otherwise XLA sorts whole rows on a CPU, and computes every weight again to compare it.
        weights = jax.lax.optimization_barrier(weights)
        largest = jax.lax.optimization_barrier(jax.lax.top_k(weights, k)[0])
        weights = jnp.where(weights >= largest[..., -1:], weights, 0)
    norm = jnp.linalg.norm(weights, axis=-1) if normalize == "l2" else weights.sum(-1)
    weights = (weights / norm[..., None]).astype(tokens.dtype)
    return accurate_einsum("bpk,bke->bpe", weights, tokens).astype(tokens.dtype)
