"""1-D codebooks by dynamic programming in plain torch: what `optimal_levels` means.

The best L levels of a sorted row cut it into L intervals, each rounded to its mean; D_l(j), the
least loss of the values before border j in l intervals, is min_i D_{l-1}(i) + C(i, j) (Bruce,
1965; exact k-means in one dimension: Wang and Song, 2011). Borders are candidates, so that the cost
does not grow with the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.backends.reference.lloyd import SortedRows
from lowra.compiler.ops import LIBRARY

CANDIDATES = 128
ROWS = 128
"""Rows whose interval costs are held at once."""


def optimal_levels(values: Tensor, weights: Tensor, counts: list[int]) -> list[Tensor]:
    parts: list[list[Tensor]] = []
    for begin in range(0, values.shape[0], ROWS):
        part = slice(begin, begin + ROWS)
        some = weights if weights.shape[0] == 1 else weights[part]
        parts.append(_optimal(SortedRows(values[part], some), counts))
    return [torch.cat(tables) for tables in zip(*parts, strict=True)]


def borders(values: Tensor) -> Tensor:
    """Candidate borders int64 [n, C + 1] of sorted values [n, k]: 0 first, k last, rising.

    They step evenly in i / k + (v_i - v_0) / (v_k-1 - v_0), so both a crowd and a tail get some.
    """
    n, k = values.shape
    if k <= CANDIDATES:
        return torch.arange(k + 1, device=values.device).expand(n, -1)
    low, high = values[:, :1], values[:, -1:]
    place = torch.arange(k, device=values.device) / k + (values - low) / (high - low).clamp_min(
        1e-300
    )
    steps = torch.arange(1, CANDIDATES, dtype=torch.float64, device=values.device)
    steps = steps * (2 / CANDIDATES)
    inner = torch.searchsorted(place.contiguous(), steps.expand(n, -1).contiguous())
    return torch.cat((inner.new_zeros(n, 1), inner, inner.new_full((n, 1), k)), 1)


def _optimal(rows: SortedRows, counts: list[int]) -> list[Tensor]:
    edges = borders(rows.values)
    mass, moment = rows.mass.gather(1, edges), rows.moment.gather(1, edges)
    m = mass.unsqueeze(1) - mass.unsqueeze(2)
    s = moment.unsqueeze(1) - moment.unsqueeze(2)
    # An interval's loss is its energy less s^2 / m; the energies of all intervals sum to the row's.
    cost = torch.where(m > 0, -s * s / m.clamp_min(1e-300), 0.0)
    size = edges.shape[1]
    backwards = torch.ones(size, size, dtype=torch.bool, device=cost.device).tril(-1)
    cost = cost.masked_fill(backwards, torch.inf)
    least = [cost[:, 0]]
    for _ in range(max(counts) - 1):
        least.append((least[-1].unsqueeze(2) + cost).amin(1))
    return [_levels(rows, edges, cost, least, count) for count in counts]


def _levels(
    rows: SortedRows, edges: Tensor, cost: Tensor, least: list[Tensor], count: int
) -> Tensor:
    """Means of the intervals of the best cut, from the last to the first."""
    n, size = edges.shape
    place = torch.full((n, 1, 1), size - 1, device=cost.device)
    cuts = [place.view(n, 1)]
    for before in least[: count - 1][::-1]:
        here = cost.gather(2, place.expand(-1, size, -1)).squeeze(2)
        place = (before + here).argmin(1).view(n, 1, 1)
        cuts.append(place.view(n, 1))
    cuts.append(torch.zeros(n, 1, dtype=torch.int64, device=cost.device))
    chosen = edges.gather(1, torch.cat(cuts[::-1], 1))
    mass = rows.mass.gather(1, chosen).diff(dim=1)
    moment = rows.moment.gather(1, chosen).diff(dim=1)
    # An empty interval stands at the first value past it; levels must not fall.
    at = rows.values.gather(1, chosen[:, :-1].clamp_max(rows.values.shape[1] - 1))
    means = torch.where(mass > 0, moment / mass.clamp_min(1e-300), at)
    return means.cummax(1)[0]


torch.library.impl(
    "lowra::optimal_levels", "CompositeExplicitAutograd", optimal_levels, lib=LIBRARY
)
