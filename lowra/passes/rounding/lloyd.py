"""Codebooks by weighted Lloyd: per row, or one per panel with a scale per row."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.packing import levels_of, width_id

NORMAL_FLOAT: dict[float, tuple[float, ...]] = {
    1: (-1.0, 1.0),
    2: (-1.0, 0.0, 0.3379, 1.0),
    4: (
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
}  # fmt: skip
"""Starting levels of the paper (Listing 1); other widths are filled in by `normal_float`."""

ITERATIONS = 200
TOLERANCE = 1e-6
WIDEST_OPTIMUM = 16
"""Levels up to which a row's optimum is searched; beyond, Lloyd's local optima are near it."""
SAMPLE_ROWS = 256
"""Rows that a shared codebook is learned from; its scales are fit to all rows."""


@dataclass(frozen=True)
class Fit:
    """levels float64 [n, L] or [L], scale float64 [n] (ones for per-row levels), loss [n]."""

    levels: Tensor
    scale: Tensor
    loss: Tensor


def fit_rows(
    values: Tensor, weights: Tensor, starts: Sequence[Tensor],
    iterations: int = ITERATIONS, tolerance: float = TOLERANCE,
) -> list[Fit]:  # fmt: skip
    """A codebook per row and start [n, L]: Lloyd until the row's loss stops falling.

    values [n, k], weights [n or 1, k or 1] (>= 0). The loss never rises from an iteration to the
    next.
    """
    *levels, loss = torch.ops.lowra.lloyd_rows(
        values, weights, [start.double() for start in starts], iterations, tolerance
    )
    one = torch.ones(values.shape[0], dtype=torch.float64)
    return [Fit(table, one, loss[:, i]) for i, table in enumerate(levels)]


def fit_rows_globally(
    values: Tensor, weights: Tensor, starts: Sequence[Tensor],
    iterations: int = ITERATIONS, tolerance: float = TOLERANCE,
) -> list[Fit]:  # fmt: skip
    """`fit_rows` from `starts` and from an optimum over candidate borders: the better per row.

    Lloyd alone ends in local optima, at 8 levels for 400 weights 3 % above the best on average.
    Tables wider than the candidates allow for keep their start.
    """
    counts = [start.shape[-1] for start in starts]
    found = [i for i, count in enumerate(counts) if count <= WIDEST_OPTIMUM]
    optima: list[Tensor] = []
    if found:
        optima = torch.ops.lowra.optimal_levels(values, weights, [counts[i] for i in found])
    fits = fit_rows(values, weights, [*starts, *optima], iterations, tolerance)
    for i, other in zip(found, fits[len(starts) :], strict=True):
        fits[i] = _better(fits[i], other)
    return fits[: len(starts)]


def _better(one: Fit, other: Fit) -> Fit:
    lower = other.loss < one.loss
    levels = torch.where(lower.unsqueeze(1), other.levels, one.levels)
    return Fit(levels, one.scale, torch.where(lower, other.loss, one.loss))


def fit_shared(
    values: Tensor, weights: Tensor, starts: Sequence[Tensor],
    iterations: int = ITERATIONS, tolerance: float = TOLERANCE,
) -> list[Fit]:  # fmt: skip
    """One codebook per start [L] for all rows, and a scale per row.

    Both are refit in turn on an even sample of the rows; then every row gets its scale.
    """
    step = max(1, values.shape[0] // SAMPLE_ROWS)
    some = weights if weights.shape[0] == 1 else weights[::step]
    *levels, _ = torch.ops.lowra.lloyd_shared(
        values[::step], some, [start.double() for start in starts], iterations, tolerance
    )
    scale, loss = torch.ops.lowra.lloyd_scales(values, weights, levels, iterations, tolerance)
    return [Fit(table, scale[:, i], loss[:, i]) for i, table in enumerate(levels)]


@functools.lru_cache(maxsize=16)
def gaussian_levels(width: float) -> Tensor:
    """Lloyd-Max levels float64 of the standard normal distribution: 2^width, or 3 at 1.6 bits."""
    count = levels_of(width_id(width))
    normal = torch.distributions.Normal(0.0, 1.0)
    grid = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    samples = normal.icdf(grid).view(1, -1)
    # The best levels of a density p crowd like p^(1/3): quantiles of a normal sqrt(3) times wider.
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    start = normal.icdf(middle).view(1, -1) * math.sqrt(3)
    half = fit_rows(samples, torch.ones_like(samples), [start], 2000, 1e-9)[0].levels[0]
    return (half - half.flip(0)) / 2


def normal_float(width: float) -> Tensor:
    """The paper's starting levels in [-1, 1]; for other widths, scaled Gaussian levels."""
    if width in NORMAL_FLOAT:
        return torch.tensor(NORMAL_FLOAT[width], dtype=torch.float64)
    levels = gaussian_levels(width)
    return levels / levels.max()
