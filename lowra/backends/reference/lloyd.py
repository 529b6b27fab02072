"""Weighted Lloyd over rows in plain torch: what `lloyd_rows`, `lloyd_shared`, `lloyd_scales` mean.

Rows are sorted once and turned into prefix sums, so that an iteration costs a binary search per
threshold instead of a pass over the weights (LowRA, ICML 2025, section 5; the rest is ours).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowra.compiler.ops import LIBRARY


class SortedRows:
    """Rows of values [n, k] with weights [n or 1, k] (>= 0), sorted, as prefix sums in float64."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.values, index = values.double().contiguous().sort(dim=1)
        mass = weights.double().expand_as(self.values).gather(1, index)
        moment = mass * self.values
        self.energy = (moment * self.values).sum(1)
        self.mass, self.moment = _prefix(mass), _prefix(moment)

    def bins(self, thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Mass and first moment [n, L] of the bins between thresholds [n, L - 1]."""
        n, k = self.values.shape
        inner = torch.searchsorted(self.values, thresholds.contiguous(), right=True)
        edges = torch.cat((inner.new_zeros(n, 1), inner, inner.new_full((n, 1), k)), dim=1)
        return self.mass.gather(1, edges).diff(dim=1), self.moment.gather(1, edges).diff(dim=1)

    def loss(self, levels: Tensor, mass: Tensor, moment: Tensor) -> Tensor:
        """Weighted squared error [n] of bins rounded to `levels` [n, L]."""
        return (self.energy + (levels * (levels * mass - 2 * moment)).sum(1)).clamp_min(0)

    def first_scale(self, levels: Tensor) -> Tensor:
        """Scales [n] that give `levels` [L] the spread of the rows."""
        spread = (levels**2).mean().sqrt()
        return (self.energy / self.mass[:, -1].clamp_min(1e-300)).sqrt() / spread


def _prefix(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(x.shape[0], 1), x.cumsum(1)), dim=1)


def lloyd_rows(
    values: Tensor, weights: Tensor, starts: list[Tensor], iterations: int, tolerance: float
) -> list[Tensor]:
    rows = SortedRows(values, weights)
    fits = [_fit_rows(rows, start, iterations, tolerance) for start in starts]
    return [*(levels for levels, _ in fits), torch.stack([loss for _, loss in fits], dim=1)]


def _fit_rows(
    rows: SortedRows, start: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    levels, loss = start.double().clone(), rows.energy
    before = torch.full_like(loss, math.inf)
    falling = torch.ones_like(loss, dtype=torch.bool)
    for _ in range(iterations):
        mass, moment = rows.bins(_midpoints(levels))
        new = torch.where(mass > 0, moment / mass.clamp_min(1e-300), levels)
        levels = torch.where(falling[:, None], new, levels)
        loss = torch.where(falling, rows.loss(levels, mass, moment), loss)
        falling &= loss < before * (1 - tolerance)
        before = loss
        if not bool(falling.any()):
            break
    return levels, loss


def lloyd_shared(
    values: Tensor, weights: Tensor, starts: list[Tensor], iterations: int, tolerance: float
) -> list[Tensor]:
    rows = SortedRows(values, weights)
    fits = [_fit_shared(rows, start, iterations, tolerance) for start in starts]
    return [*(levels for levels, _ in fits), torch.stack([loss for _, loss in fits], dim=1)]


def _fit_shared(
    rows: SortedRows, start: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """scale_r = sum_k c_k moment_rk / sum_k c_k^2 mass_rk,
    c_k = sum_r scale_r moment_rk / sum_r scale_r^2 mass_rk.
    """
    levels = start.double()
    best = levels, rows.energy
    scale, before = rows.first_scale(levels), math.inf
    for _ in range(iterations):
        mass, moment = rows.bins(scale[:, None] * _midpoints(levels))
        scale = _best_scale(levels, mass, moment, scale)
        levels = _ratio(
            (scale[:, None] * moment).sum(0), (scale[:, None] ** 2 * mass).sum(0), levels
        )
        loss = rows.loss(scale[:, None] * levels, mass, moment)
        total = float(loss.sum())
        if total < before:
            best = levels, loss
        if total >= before * (1 - tolerance):
            break
        before = total
    return best


def lloyd_scales(
    values: Tensor, weights: Tensor, starts: list[Tensor], iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    rows = SortedRows(values, weights)
    fits = [_fit_scales(rows, levels.double(), iterations, tolerance) for levels in starts]
    return torch.stack([s for s, _ in fits], dim=1), torch.stack([loss for _, loss in fits], dim=1)


def _fit_scales(
    rows: SortedRows, levels: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    scale = best = rows.first_scale(levels)
    least = rows.energy
    before = torch.full_like(least, math.inf)
    falling = torch.ones_like(least, dtype=torch.bool)
    for _ in range(iterations):
        mass, moment = rows.bins(scale[:, None] * _midpoints(levels))
        scale = torch.where(falling, _best_scale(levels, mass, moment, scale), scale)
        loss = rows.loss(scale[:, None] * levels, mass, moment)
        lower = falling & (loss < before)
        best, least = torch.where(lower, scale, best), torch.where(lower, loss, least)
        falling &= loss < before * (1 - tolerance)
        before = loss
        if not bool(falling.any()):
            break
    return best, least


def _best_scale(levels: Tensor, mass: Tensor, moment: Tensor, otherwise: Tensor) -> Tensor:
    return _ratio((moment * levels).sum(1), (mass * levels**2).sum(1), otherwise).clamp_min(0)


def _ratio(above: Tensor, below: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(1e-300), otherwise)


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[..., 1:] + levels[..., :-1]) / 2


for _kernel in (lloyd_rows, lloyd_shared, lloyd_scales):
    torch.library.impl(
        f"lowra::{_kernel.__name__}", "CompositeExplicitAutograd", _kernel, lib=LIBRARY
    )
