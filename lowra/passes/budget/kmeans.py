"""Seeded K-means in numpy, for the clusters of the paper's precision assigner.

Source: Lloyd's algorithm with k-means++ seeding (Arthur and Vassilvitskii, 2007). LowRA (ICML
2025, section 6) asks for K-means and leaves its seed and scaling open.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHUNK = 1024  # rows whose distances to all centers are held at once, in the CPU's cache
STILL = 1e-4  # squared distance, in standard deviations, all centers together


def kmeans(points: Floats, clusters: int, *, seed: int = 0, rounds: int = 50) -> Ints:
    """Label every point with its cluster: float64 [n, d] -> int64 [n], labels 0 .. k - 1.

    Features are compared after division by their standard deviation over all points; the paper
    is silent about scaling, and a raw error at 1 bit would drown the one at 4 bits. No label is
    left empty: `k` is at most `clusters` and at most the number of distinct points. Stops when
    the centers hardly move, or after `rounds`. The same points and seed give the same labels.

    Raises:
        ValueError: `points` is not a finite matrix, or `clusters` is below 1.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(f"K-means needs a finite matrix of points, got shape {points.shape}")
    if clusters < 1:
        raise ValueError(f"K-means needs at least one cluster, got {clusters}")
    if not points.size:
        return np.zeros(len(points), dtype=np.int64)
    spread = points.std(axis=0)
    features = (points - points.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    centers = _spread_centers(features, min(clusters, len(features)), seed)
    labels = _nearest_center(features, centers)
    for _ in range(rounds):
        before, centers = centers, _mean_centers(features, labels, centers)
        labels = _nearest_center(features, centers)
        if np.square(centers - before).sum() <= STILL:
            break
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _spread_centers(features: Floats, clusters: int, seed: int) -> Floats:
    """k-means++: each next center is drawn with chance proportional to its squared distance."""
    random = np.random.default_rng(seed)
    picked = [int(random.integers(len(features)))]
    distance = np.full(len(features), np.inf)
    for _ in range(clusters - 1):
        step = features - features[picked[-1]]
        np.minimum(distance, np.einsum("nd,nd->n", step, step), out=distance)
        total = np.cumsum(distance)
        if total[-1] <= 0:
            break
        place = np.searchsorted(total, random.random() * total[-1], side="right")
        picked.append(min(int(place), int(np.flatnonzero(distance)[-1])))
    return features[picked]


def _nearest_center(features: Floats, centers: Floats) -> Ints:
    labels = np.empty(len(features), dtype=np.int64)
    norms = np.einsum("kd,kd->k", centers, centers)
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        labels[rows] = (norms - 2.0 * (features[rows] @ centers.T)).argmin(axis=1)
    return labels


def _mean_centers(features: Floats, labels: Ints, centers: Floats) -> Floats:
    """The mean of each cluster; an empty one keeps its center."""
    count = np.bincount(labels, minlength=len(centers))
    sums = [np.bincount(labels, column, minlength=len(centers)) for column in features.T]
    means = np.stack(sums, axis=1) / np.maximum(count, 1)[:, None]
    return np.where(count[:, None] > 0, means, centers)
