"""Codebooks for trellis codes: shared levels, a scale per row, and paths, refit in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.compiler.storage import ROW_SCALES
from lowra.passes.rounding.feedback import path_codes
from lowra.passes.rounding.lloyd import Fit

SAMPLE_ROWS = 128
"""Rows that levels are learned from, in two runs."""

ROUNDS = 4
"""Of paths and levels on them: the error is then within a percent of where it settles."""

SHRINK = {4: 0.72, 8: 0.8, 16: 0.9}
"""Of Lloyd's levels, by their number: near to where those of a Gaussian on a trellis end."""


def fit_trellis(values: Tensor, weights: Tensor, start: Fit) -> Fit:
    """The fit of trellis codes from a Lloyd fit of as many levels [L].

    values [n, k], weights [n or 1, k] (>= 0). Levels are learned from an even sample of the rows;
    then every row gets the best scale for one more path. Losses are those of rows in runs, as they
    stand.
    """
    step = max(1, values.shape[0] // SAMPLE_ROWS)
    some = weights if weights.shape[0] == 1 else weights[::step]
    sample, scale = values[::step], start.scale[::step]
    levels = SHRINK[len(start.levels)] * start.levels
    for _ in range(ROUNDS):
        codes = path_codes(sample, levels, scale.unsqueeze(1), ROW_SCALES)
        fresh = _levels(sample, some, codes, levels, scale)
        scale = _scales(sample, some, fresh.float()[codes], scale)
        levels = fresh.sort()[0]
    picked = levels.float()[path_codes(values, levels, start.scale.unsqueeze(1), ROW_SCALES)]
    scale = _scales(values, weights, picked, start.scale)
    errors = values - picked * scale.float().unsqueeze(1)
    return Fit(levels, scale, _sums(errors**2 * weights))


def _levels(
    values: Tensor, weights: Tensor, codes: Tensor, levels: Tensor, scale: Tensor
) -> Tensor:
    """The best levels float64 [L] for these codes; one without weights stays."""
    factors = scale.float().unsqueeze(1)
    weighed, index = (weights * factors).expand(codes.shape), codes.reshape(-1)
    above = torch.bincount(index, (values * weighed).reshape(-1).double(), len(levels))
    below = torch.bincount(index, (weighed * factors).reshape(-1).double(), len(levels))
    return torch.where(below > 0, above / below.clamp_min(1e-300), levels)


def _scales(values: Tensor, weights: Tensor, picked: Tensor, scale: Tensor) -> Tensor:
    """The best scale float64 [n] of each row for the levels picked [n, k]."""
    above, below = _sums(values * picked * weights), _sums(picked**2 * weights)
    return torch.where((above > 0) & (below > 0), above / below.clamp_min(1e-300), scale)


def _sums(rows: Tensor) -> Tensor:
    """float64 [n] of [n, k]."""
    return rows.sum(1, dtype=torch.float64)
