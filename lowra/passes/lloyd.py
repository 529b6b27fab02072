"""Weighted Lloyd over rows: codebooks per row, or one per panel with a scale per row.

Rows are sorted once and turned into prefix sums, so that an iteration costs a binary search per
threshold instead of a pass over the weights (LowRA, ICML 2025, section 5; the rest is ours).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL_FLOAT: dict[int, tuple[float, ...]] = {
    1: (-1.0, 1.0),
    2: (-1.0, 0.0, 0.3379, 1.0),
    4: (
        -1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
}  # fmt: skip
"""Starting levels of the paper (Listing 1); 3 and 8 bits are filled in by `normal_float`."""


WARM_ROWS = 128
"""Rows whose shared codebook starts the fit of all rows."""


class SortedRows:
    """Rows of values [n, k] with weights [n, k] (>= 0), sorted, as prefix sums in float64."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.values, index = values.double().contiguous().sort(dim=1)
        mass = weights.double().expand_as(self.values).gather(1, index)
        moment = mass * self.values
        self.energy = (moment * self.values).sum(1)
        self.mass, self.moment = _prefix(mass), _prefix(moment)

    def some(self, count: int) -> SortedRows:
        """About `count` of the rows, evenly spaced."""
        part = SortedRows.__new__(SortedRows)
        step = max(1, len(self.energy) // count)
        part.values, part.energy = self.values[::step].contiguous(), self.energy[::step]
        part.mass, part.moment = self.mass[::step].contiguous(), self.moment[::step].contiguous()
        return part

    def bins(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Mass and first moment [n, L] of the bins between thresholds [n, L - 1]."""
        n, k = self.values.shape
        inner = torch.searchsorted(self.values, thresholds.contiguous(), right=True)
        edges = torch.cat((inner.new_zeros(n, 1), inner, inner.new_full((n, 1), k)), dim=1)
        return self.mass.gather(1, edges).diff(dim=1), self.moment.gather(1, edges).diff(dim=1)

    def loss(self, levels: Tensor, mass: Tensor, moment: Tensor) -> Tensor:
        """Weighted squared error [n] of bins rounded to `levels` [n, L]."""
        return (self.energy + (levels * (levels * mass - 2 * moment)).sum(1)).clamp_min(0)


def _prefix(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(x.shape[0], 1), x.cumsum(1)), dim=1)


@dataclass(frozen=True)
class Fit:
    """levels float64 [n, L] or [L], scale float64 [n] (ones for per-row levels), loss [n]."""

    levels: Tensor
    scale: Tensor
    loss: Tensor


def fit_rows(rows: SortedRows, start: Tensor, iterations: int = 60, tolerance: float = 1e-5) -> Fit:
    """A codebook per row from `start` [n, L]: Lloyd until the summed loss stops falling.

    An empty bin keeps its level. The loss never rises from one iteration to the next.
    """
    levels = start.double()
    ones = torch.ones_like(rows.energy)
    before = math.inf
    loss = rows.energy
    for _ in range(iterations):
        mass, moment = rows.bins(_midpoints(levels))
        levels = torch.where(mass > 0, moment / mass.clamp_min(1e-300), levels)
        loss = rows.loss(levels, mass, moment)
        total = float(loss.sum())
        if total >= before * (1 - tolerance):
            break
        before = total
    return Fit(levels, ones, loss)


def fit_shared(
    rows: SortedRows, start: Tensor, iterations: int = 60, tolerance: float = 1e-4
) -> Fit:
    """One codebook [L] for all rows and a scale per row, refit in turn, each in closed form.

    scale_r = sum_k c_k moment_rk / sum_k c_k^2 mass_rk,
    c_k = sum_r scale_r moment_rk / sum_r scale_r^2 mass_rk.
    Many rows start from the codebook of an even sample of them.
    """
    levels = start.double()
    if len(rows.energy) > 2 * WARM_ROWS:
        levels = fit_shared(rows.some(WARM_ROWS), start, iterations, tolerance).levels
    total_mass = rows.mass[:, -1].clamp_min(1e-300)
    spread = (levels**2).mean().sqrt()
    scale = (rows.energy / total_mass).sqrt() / spread
    best, before = Fit(levels, scale, rows.energy), math.inf
    for _ in range(iterations):
        mass, moment = rows.bins(scale[:, None] * _midpoints(levels)[None, :])
        scale = _ratio((moment * levels).sum(1), (mass * levels**2).sum(1), scale).clamp_min(0)
        levels = _ratio(
            (scale[:, None] * moment).sum(0), (scale[:, None] ** 2 * mass).sum(0), levels
        )
        loss = rows.loss(scale[:, None] * levels, mass, moment)
        total = float(loss.sum())
        if total < before:
            best = Fit(levels, scale, loss)
        if total >= before * (1 - tolerance):
            break
        before = total
    return best


def _ratio(above: Tensor, below: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(1e-300), otherwise)


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[..., 1:] + levels[..., :-1]) / 2


@functools.lru_cache(maxsize=16)
def gaussian_levels(width: int) -> Tensor:
    """Lloyd-Max levels float64 [2^width] of the standard normal distribution."""
    count = 1 << width
    normal = torch.distributions.Normal(0.0, 1.0)
    grid = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    samples = normal.icdf(grid).view(1, -1)
    # The best levels of a density p crowd like p^(1/3): quantiles of a normal sqrt(3) times wider.
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    start = normal.icdf(middle).view(1, -1) * math.sqrt(3)
    fit = fit_rows(SortedRows(samples, torch.ones(1, 1)), start, iterations=2000, tolerance=1e-9)
    half = fit.levels[0]
    return (half - half.flip(0)) / 2


def normal_float(width: int) -> Tensor:
    """The paper's starting levels in [-1, 1]; for 3 and 8 bits, scaled Gaussian levels."""
    if width in NORMAL_FLOAT:
        return torch.tensor(NORMAL_FLOAT[width], dtype=torch.float64)
    levels = gaussian_levels(width)
    return levels / levels.max()
