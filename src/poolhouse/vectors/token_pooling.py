"""Token pooling: fewer vectors per text, by the means of clusters of similar ones.

Ward's linkage over cosine distances, as sentence-transformers' `HierarchicalTokenPooling` and PyLate's `pool_factor` do
it. Source: Clavié, Chaffin and Adams 2024, "Reducing the Footprint of Multi-Vector Retrieval with Minimal Performance
Impact via Token Pooling".
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from poolhouse.errors import ConfigError, InvalidRequest
from poolhouse.vectors.precision import Floats


def pooled(vectors: Floats, factor: float, *, protected: int = 1, normalize: bool = True) -> Floats:
    """About one vector per `factor` of them, [fewer rows, width]: the protected first ones, then a mean per cluster.

    vectors: [rows, width] of unit length. factor: from 1, which clusters nothing. protected: first rows that stay by
    themselves, such as [CLS]. normalize: scale the result to unit length, protected rows too.
    Takes time and memory in proportion to the square of the rows: 1 GiB for 8192.

    Raises:
        InvalidRequest: an invalid factor. ConfigError: scipy, which finds the clusters, is not installed.
    """
    check_factor(factor)
    first, rest = vectors[:protected], vectors[protected:]
    clusters = max(int(len(rest) // factor), 1)
    if clusters < len(rest):
        vectors = np.concatenate([first, _means(rest, _labels(rest, clusters))])
    if not normalize:
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.float32(1e-12)))


def check_factor(factor: object, role: str | None = None) -> None:
    """Refuse an invalid factor, or one for queries, which keep all of their vectors.

    Raises:
        InvalidRequest: naming what is possible.
    """
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < math.inf:
        raise InvalidRequest(
            f"token_pooling_factor must be a number from 1, got {factor!r}.", "token_pooling_factor", factor
        )
    if role == "query":
        raise InvalidRequest(
            "token_pooling_factor is for documents: a query keeps the vectors of all its tokens.",
            "token_pooling_factor",
            factor,
        )


def _labels(vectors: Floats, clusters: int) -> npt.NDArray[np.int32]:
    """The cluster of each vector, from 1; fewer clusters than requested where distances are equal."""
    try:
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import squareform
    except ImportError:
        raise ConfigError(
            "Token pooling needs scipy, which is not installed: pip install 'poolhouse[token-pooling]'."
        ) from None
    distances = np.clip(1 - vectors @ vectors.T, 0, 2)
    # What rounding leaves on the diagonal is not read.
    tree = linkage(squareform(distances, checks=False), method="ward")
    labels: npt.NDArray[np.int32] = fcluster(tree, t=clusters, criterion="maxclust")
    return labels


def _means(vectors: Floats, labels: npt.NDArray[np.int32]) -> Floats:
    """The mean of each cluster, in the order of labels."""
    order = np.argsort(labels, kind="stable")
    counts = np.unique(labels, return_counts=True)[1]
    starts = np.cumsum(counts) - counts
    sums = np.add.reduceat(vectors[order], starts, axis=0)
    return np.asarray(sums / counts[:, None].astype(np.float32))
