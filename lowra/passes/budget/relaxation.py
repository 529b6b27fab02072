"""The Lagrangian relaxation of a multiple-choice knapsack: hulls, price of a bit, bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowra.compiler.errors import BudgetError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Assignment:
    """One option per row, what it costs, and how far from the best it can be.

    choice: int64 [rows], the index of each row's option. cost, bits: totals of the choice.
    bound: a lower bound, up to float64 rounding, on the cost of every choice within the budget.
    price: what the last bit of budget saves, the Lagrange multiplier; 0 where bits are left over.
    """

    choice: Ints
    cost: float
    bits: int
    bound: float
    price: float = 0.0

    @property
    def gap(self) -> float:
        """The part of the cost that a perfect choice might save; 0 when the cost is 0."""
        return (self.cost - self.bound) / self.cost if self.cost else 0.0


@dataclass(frozen=True)
class Relaxed:
    """A greedy choice with its Lagrangian certificate; arrays are [options, rows]."""

    cost: Floats
    bits: Ints
    plan: Assignment
    slack: int  # bits left
    excess: Floats  # what leaving the choice costs at the price of the break; inf = not allowed
    broken: int  # the row whose increment no longer fitted


@dataclass(frozen=True)
class Rows:
    """The program of all rows: cost and bits [rows, widths]; groups [rows], or None for no groups.

    Rows of one group take the same width.
    """

    cost: Floats
    bits: Ints
    groups: Ints | None = None


def relax(cost: Floats, bits: Ints, budget: int) -> Relaxed:
    """Climb the hulls greedily; the break gives the price of a bit, its dual value the bound."""
    cost, bits = np.ascontiguousarray(cost.T), np.ascontiguousarray(bits.T)
    rows = np.arange(cost.shape[1])
    corners, slopes = climb_hulls(cost, bits)
    low = int(bits[corners[0], rows].sum())
    widest = np.where(np.isfinite(cost), bits, np.iinfo(np.int64).min).max(axis=0)
    high = int(widest.sum())
    if budget < low:
        raise BudgetError(
            f"a budget of {budget} bits cannot be met: the reachable interval is "
            f"[{low}, {high}] bits"
        )
    budget = min(budget, high)
    rises = np.diff(bits[corners, rows], axis=0).ravel()
    steps = np.flatnonzero(slopes.ravel() > 0)  # lower steps first, so ties climb in order
    steps = steps[np.argsort(-slopes.ravel()[steps], kind="stable")]
    count = int(np.searchsorted(np.cumsum(rises[steps]), budget - low, side="right"))
    taken = np.bincount(steps[:count] % len(rows), minlength=len(rows))
    choice = corners[taken, rows]
    price, broken = 0.0, 0
    if count < len(steps):
        price, broken = float(slopes.ravel()[steps[count]]), int(steps[count] % len(rows))
    excess = (cost - cost[choice, rows]) + price * (bits - bits[choice, rows])
    plan = assignment_of(cost, bits, choice, 0.0, price)
    slack = budget - plan.bits
    bound = plan.cost + float(np.minimum(excess.min(axis=0), 0).sum()) - price * slack
    return Relaxed(
        cost, bits, assignment_of(cost, bits, choice, bound, price), slack, excess, broken
    )


def climb_hulls(cost: Floats, bits: Ints) -> tuple[Ints, Floats]:
    """Corners of each row's lower hull, [options, rows], and slopes, [options - 1, rows].

    A row whose hull has ended repeats its last corner with slope 0.
    """
    options, rows = cost.shape
    places = np.arange(rows)
    narrow = np.where(np.isfinite(cost), bits, np.iinfo(np.int64).max)
    here = np.where(narrow == narrow.min(axis=0), cost, np.inf).argmin(axis=0)
    corners, slopes = [here], [np.full(rows, np.inf)]
    for _ in range(options - 1):
        height, level = bits[here, places], cost[here, places]
        slope, rise, following = np.zeros(rows), np.zeros(rows, dtype=np.int64), here.copy()
        for option in range(options):
            width = bits[option] - height
            steep = np.maximum(level - cost[option], 0) / np.maximum(width, 1) * (width > 0)
            better = (steep > slope) | ((steep == slope) & (steep > 0) & (width > rise))
            slope, rise = np.where(better, steep, slope), np.where(better, width, rise)
            following[better] = option
        here = following
        corners.append(here)
        slopes.append(np.minimum(slope, slopes[-1]))  # concave in spite of rounding
    return np.stack(corners), np.stack(slopes)[1:]


def assignment_of(
    cost: Floats, bits: Ints, choice: Ints, bound: float, price: float = 0.0
) -> Assignment:
    """Totals of a choice; cost and bits are [options, rows]."""
    rows = np.arange(len(choice))
    total = float(cost[choice, rows].sum())
    return Assignment(choice, total, int(bits[choice, rows].sum()), min(bound, total), price)
