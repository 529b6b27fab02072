"""The best path through a trellis of levels, by Viterbi's algorithm in plain torch.

A path gives each row of a run a level that lowra.compiler.trellis allows after those of the rows
before; the best one has the least sum of squared errors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.trellis import HIGH_TAPS, LOW_TAPS, MEMORY, RUN

STATES = 1 << MEMORY
"""The lowest stored bits of the last rows: bit i that of i rows before."""

FAR = 1e30
"""What a state costs that nothing leads to."""


@functools.cache
def transitions() -> tuple[Tensor, Tensor]:
    """Of each state and of the bit that it forgets, int64 [STATES, 2]: the state before, and the
    subset of levels that the step between them may use."""
    state = torch.arange(STATES).unsqueeze(1)
    forgotten = torch.arange(2)
    bits = state | (forgotten << MEMORY)
    low = functools.reduce(torch.bitwise_xor, [bits >> tap & 1 for tap in LOW_TAPS])
    high = functools.reduce(torch.bitwise_xor, [bits >> tap & 1 for tap in HIGH_TAPS])
    return bits >> 1, 2 * high + low


def best_path(errors: Tensor) -> Tensor:
    """Subsets int64 [runs, rows] of the path of least total error, from the least error of each row
    in each subset, float32 [runs, rows, 4]."""
    before, subset = (table.to(errors.device) for table in transitions())
    runs, rows = errors.shape[:2]
    cost = errors.new_full((runs, STATES), FAR)
    cost[:, 0] = 0
    choices: list[Tensor] = []
    for row in range(rows):
        both = cost[:, before] + errors[:, row][:, subset]
        cost, choice = both.min(2)
        choices.append(choice)
    state = cost.argmin(1, keepdim=True)
    path = torch.empty(runs, rows, dtype=torch.int64, device=errors.device)
    for row in range(rows - 1, -1, -1):
        forgotten = choices[row].gather(1, state)
        path[:, row] = subset[state, forgotten].squeeze(1)
        state = before[state, forgotten]
    return path


def places_of(runs: Tensor) -> Tensor:
    """int64 [runs, RUN]: the rows of each run in turn, filled up with len(runs).

    `runs` int64 [n] has the run of each row, -1 for a row of its own. Raises ValueError for a run
    that is too long.
    """
    n = len(runs)
    rows = (runs >= 0).nonzero().squeeze(1)
    rows = rows[torch.argsort(runs[rows], stable=True)]
    counts = runs[rows].unique_consecutive(return_counts=True)[1]
    if len(counts) and int(counts.max()) > RUN:
        raise ValueError(f"a run of {int(counts.max())} rows; {RUN} are the most")
    places = torch.full((len(counts), RUN), n, device=runs.device)
    inside = torch.arange(RUN, device=runs.device) < counts.unsqueeze(1)
    places[inside] = rows
    return places


@dataclass(frozen=True)
class Rounding:
    """How a column of rows is rounded: each row to its nearest level, or runs along best paths.

    tables float32 [n, L] ascending, filled up with +inf. thresholds [n, L - 1]: their middles.
    places: as `places_of` gives them; None without runs.
    """

    tables: Tensor
    thresholds: Tensor
    places: Tensor | None

    @classmethod
    def of(cls, tables: Tensor, runs: Tensor | None) -> Rounding:
        """`runs` int64 [n]: the run of each row, -1 for a row of its own."""
        thresholds = ((tables[:, 1:] + tables[:, :-1]) / 2).contiguous()
        return cls(tables, thresholds, None if runs is None else places_of(runs))

    def __call__(self, wanted: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int64 [n] of a column `wanted` [n] under each row's scale, and their values."""
        codes = torch.searchsorted(self.thresholds, (wanted / scale).unsqueeze(1)).squeeze(1)
        if self.places is not None:
            there = self.places < len(wanted)
            codes[self.places[there]] = self._on_paths(wanted, scale, there)[there]
        return codes, self.tables.gather(1, codes.unsqueeze(1)).squeeze(1) * scale

    def _on_paths(self, wanted: Tensor, scale: Tensor, there: Tensor) -> Tensor:
        """Codes int64 [runs, RUN]."""
        assert self.places is not None
        rows = self.places.clamp_max(len(wanted) - 1)
        levels = self.tables[rows] * scale[rows].unsqueeze(2)
        errors = ((wanted[rows].unsqueeze(2) - levels) ** 2).unflatten(2, (-1, 4))
        least, within = errors.min(2)
        subset = best_path(torch.where(there.unsqueeze(2), least, 0.0))
        return 4 * within.gather(2, subset.unsqueeze(2)).squeeze(2) + subset
