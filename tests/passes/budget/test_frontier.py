"""The relaxation over options: bounds hold, and a budget met to the bit is met best."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.passes.budget.frontier import Frontier, frontier, price_of_bits, ranked
from lowra.passes.budget.relaxation import Floats, Ints

Option = tuple[Floats, Ints, int]
"""cost and bits [rows, widths] of a unit in one layout, and bits beside its rows."""


def instance(seed: int) -> list[list[Option]]:
    """2 or 3 units of 1 to 3 rows, 2 or 3 options each, 3 widths; some widths not allowed."""
    random = np.random.default_rng(seed)
    units: list[list[Option]] = []
    for _ in range(random.integers(2, 4)):
        rows = int(random.integers(1, 4))
        loud = np.exp(random.normal(0, 1.5, (rows, 1)))
        unit: list[Option] = []
        for _ in range(random.integers(2, 4)):
            fall = np.array([0.36, 0.12, 0.03]) * np.exp(random.normal(0, 0.4, (rows, 3)))
            bits = np.array([10, 20, 30]) + random.integers(0, 8)
            closed = random.random((rows, 3)) < 0.1
            closed[:, 0] = False
            cost = np.where(closed, np.inf, loud * fall)
            unit.append((cost, np.tile(bits, (rows, 1)), int(random.integers(0, 25))))
        units.append(unit)
    return units


def frontiers(units: list[list[Option]]) -> list[list[Frontier]]:
    return [[frontier(*option) for option in unit] for unit in units]


def ends(option: Option) -> list[tuple[float, int]]:
    """Loss and bits of every choice of widths."""
    cost, bits, beside = option
    rows = range(len(cost))
    return [
        (sum(cost[r, w] for r, w in zip(rows, widths, strict=True)),
         beside + sum(int(bits[r, w]) for r, w in zip(rows, widths, strict=True)))
        for widths in itertools.product(range(cost.shape[1]), repeat=len(cost))
    ]  # fmt: skip


def optimum(
    units: list[list[Option]], budget: int, options: tuple[int, ...] | None = None
) -> float:
    """The least loss within the budget, by trying everything; of given options, where given."""
    best = {0: 0.0}
    for index, unit in enumerate(units):
        allowed = unit if options is None else [unit[options[index]]]
        after: dict[int, float] = {}
        for stored, loss in best.items():
            for more, bits in (end for option in allowed for end in ends(option)):
                if stored + bits <= budget:
                    after[stored + bits] = min(after.get(stored + bits, np.inf), loss + more)
        best = after
    return min(best.values(), default=np.inf)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(20, 340))
def test_the_bound_holds_and_the_choice_fits(seed: int, budget: int) -> None:
    units = instance(seed)
    priced, best = price_of_bits(frontiers(units), budget), optimum(units, budget)
    if priced is None:
        assert np.isinf(best)
        return
    assert priced.bound <= best * (1 + 1e-9) and best <= priced.choice.loss * (1 + 1e-9)
    assert priced.choice.bits <= budget


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(60, 340))
def test_a_budget_that_the_choice_meets_to_the_bit_has_no_better_one(
    seed: int, budget: int
) -> None:
    units = instance(seed)
    priced = price_of_bits(frontiers(units), budget)
    if priced is not None:
        assert np.isclose(optimum(units, priced.choice.bits), priced.choice.loss, rtol=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(80, 340))
def test_every_choice_comes_up_once_with_a_bound_that_rises_and_holds(
    seed: int, budget: int
) -> None:
    units = instance(seed)
    priced = price_of_bits(frontiers(units), budget)
    if priced is None:
        return
    found = list(ranked(frontiers(units), priced))
    assert {plan for _, plan in found} == set(itertools.product(*(range(len(u)) for u in units)))
    assert len(found) == len({plan for _, plan in found})
    assert found[0] == (priced.bound, priced.choice.options)
    bounds = [bound for bound, _ in found]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(bounds))
    for bound, plan in found[:8]:
        assert bound <= optimum(units, budget, plan) * (1 + 1e-9)


def test_a_price_buys_what_saves_more_than_it_and_no_more() -> None:
    cost, bits = np.array([[9.0, 4.0, 1.0]]), np.array([[1, 2, 4]])
    line = frontier(cost, bits, 10)
    assert line.at(6.0) == (9.0, 11) and line.at(5.0) == (9.0, 11)
    assert line.at(4.9) == (4.0, 12) and line.at(1.0) == (1.0, 14) and line.at(0) == (1.0, 14)


def test_a_width_that_is_not_allowed_is_never_bought() -> None:
    line = frontier(np.array([[np.inf, 4.0, np.inf]]), np.array([[1, 2, 4]]), 0)
    assert line.at(0.0) == line.at(1e9) == (4.0, 2)
