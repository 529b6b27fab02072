"""Which option each unit takes at one price of a bit: the Lagrangian relaxation over layouts.

A unit (a site, or siblings that share one width) in one layout is a multiple-choice knapsack of its
rows. At a price p of a bit its rows take the widths of least loss + p * bits, so what the unit
loses and stores is a function of p alone: its frontier, the rows' convex hulls merged by slope.
Over all units, each takes the option of least

    sum over rows of min over widths (loss + p * row bits) + p * bits beside the rows

and the price is bisected until the bits fit the budget. For every p, the sum of these minima less
p * budget is a bound on the loss of any choice within the budget (weak duality), and where a choice
stores the budget to the bit, it is the best there is (Everett, 1963).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lowra.passes.budget.relaxation import Floats, Ints, climb_hulls

HALVINGS = 100
"""Of the price, from the first that is high enough; float64 ends sooner."""


@dataclass(frozen=True)
class Frontier:
    """slopes [steps]: loss saved per bit, falling. loss, bits [steps + 1]: after so many steps."""

    slopes: Floats
    loss: Floats
    bits: Ints

    def at(self, price: float) -> tuple[float, int]:
        """Loss and bits where a bit costs `price`; of equal ones the fewest bits."""
        steps = int(np.searchsorted(-self.slopes, -price, side="left"))
        return float(self.loss[steps]), int(self.bits[steps])


def frontier(cost: Floats, bits: Ints, beside: int) -> Frontier:
    """The frontier of a unit: cost [rows, widths], inf where not allowed, and bits alike."""
    rows = np.arange(len(cost))
    cost, bits = np.ascontiguousarray(cost.T), np.ascontiguousarray(bits.T)
    corners, slopes = climb_hulls(cost, bits)
    loss, stored = cost[corners, rows], bits[corners, rows]
    steps = np.argsort(-slopes.ravel(), kind="stable")
    steps = steps[slopes.ravel()[steps] > 0]
    falls, rises = np.diff(loss, axis=0).ravel()[steps], np.diff(stored, axis=0).ravel()[steps]
    return Frontier(
        slopes.ravel()[steps],
        float(loss[0].sum()) + np.concatenate([[0.0], np.cumsum(falls)]),
        int(stored[0].sum()) + beside + np.concatenate([[0], np.cumsum(rises)]),
    )


@dataclass(frozen=True)
class Choice:
    """options: per unit, the index of what it takes. bits: what that stores at its price."""

    options: tuple[int, ...]
    loss: float
    bits: int


@dataclass(frozen=True)
class Priced:
    """The price at which the budget ends, what is chosen at it, and the dual bound.

    choice: fits the budget; just below the price it would not. bound: no choice of options and
    widths within the budget loses less.
    """

    choice: Choice
    price: float
    bound: float


def cheapest(units: Sequence[Sequence[Frontier]], price: float) -> Choice:
    """Each unit's option of least loss + price * bits; of equal ones the fewest bits, the first."""
    options: list[int] = []
    loss, bits = 0.0, 0
    for unit in units:
        ends = [option.at(price) for option in unit]
        best = min(range(len(unit)), key=lambda o: (ends[o][0] + price * ends[o][1], ends[o][1]))
        options.append(best)
        loss, bits = loss + ends[best][0], bits + ends[best][1]
    return Choice(tuple(options), loss, bits)


def price_of_bits(units: Sequence[Sequence[Frontier]], budget: int) -> Priced | None:
    """Bisect the price of a bit; None where not even the fewest bits fit the budget."""
    if sum(min(int(option.bits[0]) for option in unit) for unit in units) > budget:
        return None
    free = cheapest(units, 0.0)
    if free.bits <= budget:
        return Priced(free, 0.0, free.loss)
    high = max((float(o.slopes[0]) for unit in units for o in unit if len(o.slopes)), default=1.0)
    low, within = 0.0, cheapest(units, high)
    while within.bits > budget:
        low, high = high, 2 * high
        within = cheapest(units, high)
    bound = _dual(within, high, budget)
    for _ in range(HALVINGS):
        price = (low + high) / 2
        if not low < price < high:
            break
        found = cheapest(units, price)
        bound = max(bound, _dual(found, price, budget))
        if found.bits <= budget:
            high, within = price, found
        else:
            low = price
    return Priced(within, high, bound)


def _dual(choice: Choice, price: float, budget: int) -> float:
    return choice.loss + price * (choice.bits - budget)


def ranked(
    units: Sequence[Sequence[Frontier]], priced: Priced
) -> Iterator[tuple[float, tuple[int, ...]]]:
    """All choices of options, the most promising first, each with its dual bound at the price.

    A bound is that of the best choice and what each unit loses by another option, at that price.
    The first is `priced.choice`, which fits the budget; others may not.
    """
    ends = [[option.at(priced.price) for option in unit] for unit in units]
    values = [[loss + priced.price * bits for loss, bits in unit] for unit in ends]
    orders = [
        sorted(range(len(row)), key=lambda o, row=row, unit=unit: (row[o], unit[o][1]))
        for row, unit in zip(values, ends, strict=True)
    ]
    best = tuple(0 for _ in units)
    waiting = [(0.0, best, 0)]
    while waiting:
        excess, ranks, first = heapq.heappop(waiting)
        yield priced.bound + excess, tuple(o[r] for o, r in zip(orders, ranks, strict=True))
        for unit in range(first, len(units)):  # in rising order, so that each comes up once
            order, rank = orders[unit], ranks[unit] + 1
            if rank < len(order):
                rise = values[unit][order[rank]] - values[unit][order[rank - 1]]
                after = (*ranks[:unit], rank, *ranks[unit + 1 :])
                heapq.heappush(waiting, (excess + rise, after, unit))
