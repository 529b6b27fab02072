"""The precision programs against brute force, hand-worked cases and their own bounds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.compiler.errors import BudgetError, SolverError
from lowra.passes.budget import solver
from lowra.passes.budget.kmeans import kmeans
from lowra.passes.budget.solver import Assignment, solve_knapsack, solve_two_level

EXACT = 1e-6  # CP-SAT stops at a proven gap of 1e-7


def cheapest(cost: np.ndarray, bits: np.ndarray, budget: int) -> float:
    """The least cost within the budget, by trying every choice; inf where there is none."""
    rows = np.arange(len(cost))
    choices = np.array(list(itertools.product(range(cost.shape[1]), repeat=len(cost))))
    costs, used = cost[rows, choices].sum(axis=1), bits[rows, choices].sum(axis=1)
    return float(costs[used <= budget].min(initial=math.inf))


def check_totals(plan: Assignment, cost: np.ndarray, bits: np.ndarray, budget: int) -> None:
    rows = np.arange(len(cost))
    assert plan.choice.dtype == np.int64 and plan.choice.shape == rows.shape
    assert plan.cost == pytest.approx(cost[rows, plan.choice].sum())
    assert plan.bits == bits[rows, plan.choice].sum() <= budget
    assert plan.bound <= plan.cost and plan.gap >= 0


def rows_of(count: int, seed: int, options: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a 7B model has them: two sizes, lognormal variance, falling errors."""
    random = np.random.default_rng(seed)
    sizes = np.where(random.random(count) < 0.1, 11008, 4096)
    scale = sizes * np.exp(random.normal(0, 1, count))
    errors = np.array([0.3575, 0.19, 0.1115, 0.03, 0.0071])[:options]
    cost = scale[:, None] * errors * np.exp(random.normal(0, 0.03, (count, options)))
    return cost, (sizes[:, None] * np.array([1, 1.6, 2, 3, 4])[:options]).astype(np.int64)


@st.composite
def small_programs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    rows, options = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cost = draw(st.sampled_from([1e-9, 1.0, 1e9])) * random.random((rows, options))
    if draw(st.booleans()):
        cost = np.round(cost, 1)  # ties
    closed = random.random(cost.shape) < draw(st.sampled_from([0.0, 0.3]))
    closed[np.arange(rows), random.integers(options, size=rows)] = False
    cost = np.where(closed, np.inf, cost)
    bits = random.integers(0, draw(st.sampled_from([4, 50, 10**6])), (rows, options))
    low = int(np.where(closed, 2**40, bits).min(axis=1).sum())
    return cost, bits, low + draw(st.integers(0, 1 + int(bits.sum()) // options))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(small_programs())
def test_knapsack_equals_brute_force(program: tuple[np.ndarray, np.ndarray, int]) -> None:
    cost, bits, budget = program
    plan, best = solve_knapsack(cost, bits, budget), cheapest(cost, bits, budget)
    check_totals(plan, cost, bits, budget)
    assert plan.cost == pytest.approx(best, rel=EXACT, abs=1e-30)
    assert plan.bound <= best * (1 + 1e-12) and plan.gap <= EXACT


@settings(max_examples=60, deadline=None, derandomize=True)
@given(small_programs(), st.integers(0, 2))
def test_narrow_band_keeps_budget_and_bound(
    program: tuple[np.ndarray, np.ndarray, int], band: int
) -> None:
    cost, bits, budget = program
    plan = solve_knapsack(cost, bits, budget, band=band)
    check_totals(plan, cost, bits, budget)
    assert plan.bound <= cheapest(cost, bits, budget) * (1 + 1e-12) <= plan.cost * (1 + 1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_groups_take_one_option(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = random.permutation(np.repeat([7, -3, 40], [4, 1, 5]))
    cost, bits = random.random((10, 3)), random.integers(1, 20, (10, 3))
    cost[random.integers(10), random.integers(3)] = np.inf
    names = np.unique(groups)
    group_cost = np.stack([cost[groups == name].sum(axis=0) for name in names])
    group_bits = np.stack([bits[groups == name].sum(axis=0) for name in names])
    low = int(np.where(np.isinf(group_cost), 999, group_bits).min(axis=1).sum())
    plan = solve_knapsack(cost, bits, low + 15, groups=groups)
    check_totals(plan, cost, bits, low + 15)
    assert all(len(np.unique(plan.choice[groups == name])) == 1 for name in names)
    assert plan.cost == pytest.approx(cheapest(group_cost, group_bits, low + 15), rel=EXACT)


def test_knapsack_by_hand() -> None:
    cost, bits = np.array([[8.0, 2.0, 0.0], [4.0, 3.0, 0.0]]), np.array([1, 2, 4])
    plan = solve_knapsack(cost, bits, 4)
    assert (plan.choice.tolist(), plan.cost, plan.bits) == ([1, 1], 5.0, 4)
    plan = solve_knapsack(cost, bits, 5)
    assert (plan.choice.tolist(), plan.cost, plan.bits) == ([2, 0], 4.0, 5)
    plan = solve_knapsack(cost, bits, 6)
    assert (plan.choice.tolist(), plan.cost, plan.bits) == ([1, 2], 2.0, 6)
    assert plan.bound == pytest.approx(2.0)


def test_knapsack_beats_greedy() -> None:
    """Greedy takes the steep small step of row 0; the budget is better spent on row 1."""
    cost, bits = np.array([[10.0, 6.0], [10.0, 1.0]]), np.array([[0, 2], [0, 5]])
    assert solve_knapsack(cost, bits, 6, band=0).choice.tolist() == [1, 0]
    plan = solve_knapsack(cost, bits, 6)
    assert plan.choice.tolist() == [0, 1] and plan.gap == pytest.approx(0, abs=EXACT)


def test_budget_beyond_all_options_takes_the_cheapest() -> None:
    cost, bits = rows_of(50, 0)
    plan = solve_knapsack(cost, bits, 10**30)
    assert (plan.choice == cost.argmin(axis=1)).all() and plan.gap == 0


def test_budget_at_the_floor_takes_the_narrowest() -> None:
    cost, bits = rows_of(50, 0)
    plan = solve_knapsack(cost, bits, int(bits[:, 0].sum()))
    assert (plan.choice == 0).all() and plan.gap == pytest.approx(0, abs=EXACT)


def test_equal_rows_spend_the_budget_on_both_sides_of_the_break() -> None:
    """2 bits lie inside the hull of {1, 3} but the last bit of budget can only buy them."""
    cost = np.tile([10.0, 6.0, 0.0], (2000, 1))
    plan = solve_knapsack(cost, np.array([1, 2, 3]), 2000 + 1001)
    assert plan.bits == 3001 and plan.cost == pytest.approx(1499 * 10 + 6)


def test_zero_cost_and_no_rows() -> None:
    plan = solve_knapsack(np.zeros((3, 2)), np.array([1, 2]), 4)
    assert (plan.cost, plan.gap, plan.bits) == (0.0, 0.0, 3)
    empty = solve_knapsack(np.zeros((0, 2)), np.array([1, 2]), 0)
    assert (empty.choice.shape, empty.cost, empty.bits, empty.gap) == ((0,), 0.0, 0, 0.0)


def test_unreachable_budget_names_the_interval() -> None:
    cost = np.array([[1.0, 0.5, 0.0], [np.inf, 0.5, np.inf]])
    with pytest.raises(BudgetError, match=r"2 bits .*\[3, 6\] bits"):
        solve_knapsack(cost, np.array([1, 2, 4]), 2)


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ([[1.0, 2.0], [1.0, math.nan], [math.nan, 0.0]], "row 1, option 1: cost nan"),
        ([[1.0, -2.0]], r"row 0, option 1: cost -2\.0"),
        ([[1.0, 2.0], [math.inf, math.inf]], "row 1 has no allowed option"),
        ([[1.0, 2.0, 3.0]], r"shape \(2,\) do not match costs of shape \(1, 3\)"),
        ([1.0, 2.0], r"\[rows, options\]"),
    ],
)
def test_bad_costs_are_refused(cost: list[float], message: str) -> None:
    with pytest.raises(SolverError, match=message):
        solve_knapsack(np.array(cost), np.array([1, 2]), 10)


def test_bad_groups_are_refused() -> None:
    cost = np.array([[1.0, np.inf], [np.inf, 1.0]])
    with pytest.raises(SolverError, match="group 5 has no option"):
        solve_knapsack(cost, np.array([1, 2]), 10, groups=np.array([5, 5]))
    with pytest.raises(SolverError, match="group ids"):
        solve_knapsack(cost, np.array([1, 2]), 10, groups=np.array([5]))


def test_many_rows_reach_a_small_gap_twice_alike() -> None:
    cost, bits = rows_of(100_000, 0)
    budget = int(1.5 * bits[:, 0].sum())
    plan, again = (solve_knapsack(cost, bits, budget) for _ in range(2))
    check_totals(plan, cost, bits, budget)
    assert plan.gap < 1e-4
    assert (plan.choice == again.choice).all() and plan.bound == again.bound


# --- the paper's two levels ---------------------------------------------------------------------


def test_two_level_by_hand() -> None:
    """Two rows of size 10, two of 100: at 2 bits per weight no pair can hold a 4 (1 + 4 > 4)."""
    mse = np.array([[9.0, 3.0, 0.0], [4.0, 3.0, 0.0], [5.0, 4.0, 0.0], [1.0, 0.5, 0.0]])
    plan = solve_two_level(mse, np.array([10, 100, 10, 100]), (1, 2, 4), 2.0)
    assert plan.choice.tolist() == [1, 1, 1, 1]
    assert plan.cost == pytest.approx(10 * (3 + 4) + 100 * (3 + 0.5))
    assert plan.bits == 2 * 220 and plan.bound <= plan.cost
    plan = solve_two_level(mse, np.array([10, 100, 10, 100]), (1, 2, 4), 2.5)
    assert plan.choice.tolist() == [2, 2, 0, 0]  # 4 + 1 bits: 0 + 5 and 0 + 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(1.0, 4.5))
def test_two_level_is_exact_per_size_with_a_cluster_per_row(seed: int, budget: float) -> None:
    random = np.random.default_rng(seed)
    mse, sizes = random.random((9, 3)), random.choice([8, 24], 9)
    widths = np.array([1, 2, 4])
    plan = solve_two_level(mse, sizes, (1, 2, 4), budget)
    best = 0.0
    for size in np.unique(sizes):
        rows = sizes == size
        units = math.floor(min(budget, 4) * rows.sum() + 1e-9)
        assert widths[plan.choice[rows]].sum() <= units
        bits = np.broadcast_to(widths, mse[rows].shape)
        best += cheapest(mse[rows] * size, bits, units)
    assert plan.cost == pytest.approx(best, rel=EXACT)
    assert plan.bound <= best * (1 + 1e-12)


@pytest.mark.parametrize("budget", [1.0, 1.15, 2.5])
def test_two_level_keeps_the_budget_of_every_size(budget: float) -> None:
    cost, _ = rows_of(3000, 3)
    sizes = np.where(np.random.default_rng(3).random(3000) < 0.1, 11008, 4096)
    mse = cost[:, [0, 2, 4]] / sizes[:, None]
    plan = solve_two_level(mse, sizes, (1, 2, 4), budget, clusters=16)
    used = np.array([1, 2, 4])[plan.choice]
    assert all(used[sizes == size].mean() <= budget for size in (4096, 11008))
    assert plan.bits == (used * sizes).sum() and 0 <= plan.gap < 0.05
    again = solve_two_level(mse, sizes, (1, 2, 4), budget, clusters=16)
    assert (plan.choice == again.choice).all()
    free = solve_knapsack(mse * sizes[:, None], np.outer(sizes, [1, 2, 4]), plan.bits, band=48)
    assert free.cost <= plan.cost * (1 + EXACT)


@pytest.mark.parametrize(
    ("mse", "sizes", "budget", "error", "message"),
    [
        ([[1.0, 0.5]], [8], 0.99, BudgetError, r"0\.99 bits .*\[1, 2\] bits per weight"),
        ([[1.0, 0.5]], [8], math.nan, BudgetError, "cannot be met"),
        ([[1.0, 0.5], [math.inf, 0.5]], [8, 8], 1.5, SolverError, "row 1: size 8"),
        ([[1.0, 0.5], [math.nan, 0.5]], [8, 8], 1.5, SolverError, "row 1, option 0"),
        ([[1.0, 0.5], [1.0, 0.5]], [8, 0], 1.5, SolverError, "row 1: size 0"),
        ([[1.0, 0.5], [1.0, 0.5]], [8], 1.5, SolverError, "do not match"),
        ([[1.0, 0.5, 0.1]], [8], 1.5, SolverError, "do not match"),
    ],
)
def test_two_level_refuses(
    mse: list[list[float]], sizes: list[int], budget: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        solve_two_level(np.array(mse), np.array(sizes), (1, 2), budget)


def test_two_level_without_error_or_rows() -> None:
    plan = solve_two_level(np.zeros((6, 2)), np.full(6, 8), (1, 2), 1.5)
    assert plan.cost == 0 and plan.bits <= 72
    empty = solve_two_level(np.zeros((0, 2)), np.zeros(0, dtype=int), (1, 2), 1.5)
    assert empty.choice.shape == (0,) and empty.cost == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_transport_is_integral_and_cheapest(seed: int) -> None:
    random = np.random.default_rng(seed)
    cost, wanted = random.random((6, 3)), random.integers(0, 3, 6)
    demand = np.bincount(wanted, minlength=3)
    choice = solver._transport(cost, demand)
    assert (np.bincount(choice, minlength=3) == demand).all()
    best = min(cost[np.arange(6), list(way)].sum() for way in itertools.permutations(wanted))
    assert cost[np.arange(6), choice].sum() == pytest.approx(best)


# --- K-means ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_separate_blobs(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.permutation(np.repeat(np.arange(4), 300))
    middles = np.array([[0, 0, 0], [9, 0, 1e6], [0, 9, 1e6], [9, 9, 0]])
    points = middles[truth] + random.normal(0, [0.02, 0.02, 2e3], (1200, 3))
    labels = kmeans(points, 4, seed=seed)
    assert len({*zip(truth.tolist(), labels.tolist(), strict=True)}) == 4
    assert (labels == kmeans(points, 4, seed=seed)).all()


def test_kmeans_leaves_no_label_empty() -> None:
    points = np.repeat(np.arange(5.0)[:, None], 40, axis=0)
    labels = kmeans(points, 128)
    assert np.unique(labels).tolist() == [0, 1, 2, 3, 4]
    assert all(len(np.unique(group)) == 1 for group in labels.reshape(5, 40))
    assert kmeans(np.ones((7, 2)), 3).tolist() == [0] * 7
    assert kmeans(np.zeros((0, 3)), 4).shape == (0,)


def test_kmeans_refuses() -> None:
    with pytest.raises(ValueError, match="finite"):
        kmeans(np.array([[math.nan]]), 1)
    with pytest.raises(ValueError, match="at least one"):
        kmeans(np.ones((3, 1)), 0)
