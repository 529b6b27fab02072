"""Codebooks in closed form given codes, in the metric of the output error."""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST_REFIT = 16
"""Levels up to which tables are refit: each level costs a product with the Gram matrix, and a
256-entry table is nearly exact anyway."""

RIDGE = 1e-9


def refit_levels(
    gram: Tensor, slope: Tensor, codes: Tensor, tables: Tensor, scales: Tensor | None,
    shared: bool = False,
) -> Tensor:  # fmt: skip
    """Tables [n, L] that minimise e G e' for the codes [n, k], row by row or over a whole panel.

    With D [k, L] the scaled indicator of each level, w^ = D c and c = (D'G D)^-1 D'G w; from the
    present tables, c + (D'G D)^-1 D' slope' with slope = (w - w^) G [n, k]. `scales` [n, k] are
    those of each weight. shared: rows with equally many finite levels are one panel with one
    table, both sides summed over its rows. A level without weights keeps its value. Levels need not
    rise afterwards, and are not rounded to float16.
    """
    size = torch.isfinite(tables).sum(1)
    result = tables.clone()
    for count in size.unique().tolist():
        if count > WIDEST_REFIT:
            continue
        rows = size == count
        some = codes[rows]
        weight = torch.ones_like(slope[rows]) if scales is None else scales[rows]
        matrix = _normal_matrix(gram, some, weight, count)
        right = torch.zeros(len(some), count, dtype=torch.float64)
        right.scatter_add_(1, some, (slope[rows] * weight).double())
        if shared:
            matrix, right = matrix.sum(0, keepdim=True), right.sum(0, keepdim=True)
        result[rows, :count] = tables[rows, :count] + _solved(matrix, right).float()
    return result


def _normal_matrix(gram: Tensor, codes: Tensor, weight: Tensor, count: int) -> Tensor:
    """D'G D of every row: float64 [n, L, L]."""
    matrix = torch.zeros(codes.shape[0], count, count, dtype=torch.float64)
    for level in range(count):
        image = (weight * (codes == level)) @ gram
        matrix[:, level].scatter_add_(1, codes, (image * weight).double())
    return (matrix + matrix.mT) / 2


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Solutions [n, L]; 0 for levels whose row and column are empty."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    least = diagonal.amax(1, keepdim=True).clamp_min(1e-300) * RIDGE
    ridge = torch.where(diagonal > 0, least, least.clamp_min(1.0))
    return torch.linalg.solve(matrix + torch.diag_embed(ridge), right.unsqueeze(2)).squeeze(2)
