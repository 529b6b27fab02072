"""Codebooks for trellis codes: shared levels, a scale per row, and paths, refit in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.compiler.storage import ROW_SCALES
from lowra.passes.rounding.feedback import path_codes
from lowra.passes.rounding.lloyd import SAMPLE_ROWS, Fit

ROUNDS = 8
"""Of paths and levels on a sample of rows. From Lloyd's levels, the error of a Gaussian is then
within a percent of where it settles."""

SCALE_ROUNDS = 2
"""Of paths and scales on all rows."""


def fit_trellis(values: Tensor, weights: Tensor, start: Fit) -> Fit:
    """The fit of trellis codes from a Lloyd fit of as many levels [L].

    values [n, k], weights [n or 1, k] (>= 0). Levels are learned from an even sample of the rows;
    then every row gets its scale. Losses are those of rows in runs, as they stand.
    """
    step = max(1, values.shape[0] // SAMPLE_ROWS)
    some = weights if weights.shape[0] == 1 else weights[::step]
    sample, levels, scale = values[::step], start.levels, start.scale[::step]
    for _ in range(ROUNDS):
        codes = path_codes(sample, levels, scale.unsqueeze(1), ROW_SCALES)
        fresh = _levels(sample, some, codes, levels, scale)
        scale = _scales(sample, some, fresh[codes], scale)
        levels = fresh.sort()[0]
    scale, picked = start.scale, values
    for _ in range(SCALE_ROUNDS):
        picked = levels[path_codes(values, levels, scale.unsqueeze(1), ROW_SCALES)]
        scale = _scales(values, weights, picked, scale)
    errors = values - picked * scale.unsqueeze(1)
    return Fit(levels, scale, (errors**2 * weights).sum(1))


def _levels(
    values: Tensor, weights: Tensor, codes: Tensor, levels: Tensor, scale: Tensor
) -> Tensor:
    """The best levels float64 [L] for these codes; one without weights stays."""
    factors = scale.unsqueeze(1)
    index = codes.reshape(-1)
    above = torch.zeros_like(levels).index_add_(0, index, (values * weights * factors).reshape(-1))
    mass = (weights * factors**2).expand(codes.shape).reshape(-1)
    below = torch.zeros_like(levels).index_add_(0, index, mass)
    return torch.where(below > 0, above / below.clamp_min(1e-300), levels)


def _scales(values: Tensor, weights: Tensor, picked: Tensor, scale: Tensor) -> Tensor:
    """The best scale float64 [n] of each row for the levels picked [n, k]."""
    above = (values * picked * weights).sum(1)
    below = (picked**2 * weights).sum(1)
    return torch.where((above > 0) & (below > 0), above / below.clamp_min(1e-300), scale)
