"""Who gets how many bits: the two precision programs, solved with OR-Tools.

`solve_knapsack` is one multiple-choice knapsack over all rows, with a proven gap.
`solve_two_level` is the assigner of the LowRA paper (ICML 2025, section 6, algorithm 1). This is
the only file of the project that imports OR-Tools, so import it late.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from ortools.graph.python import min_cost_flow
from ortools.sat.python import cp_model

from lowra.compiler.errors import BudgetError, SolverError
from lowra.passes.budget.kmeans import kmeans
from lowra.passes.budget.relaxation import Assignment, Floats, Ints, Relaxed, assignment_of, relax

FIRST_BAND = 48  # rows of the first exact solve
NEGLIGIBLE = 1e-7  # a proven gap below this part of the cost is not worth more search
INTEGER_RANGE = 1e9  # the largest scaled cost given to OR-Tools
TINY = 1e-290  # stands for a largest cost of 0, where 1 / 0 would
INTEGER_TOTAL = 2.0**52  # the largest scaled total


CLUSTER_GAP = 1e-6
"""Relative gap at which the cluster program of the paper counts as solved."""


def solve_knapsack(
    cost: Floats,
    bits: Ints,
    budget: int,
    *,
    groups: Ints | None = None,
    band: int = 400,
    seconds: float = 1.0,
) -> Assignment:
    """Choose one option per row: least total cost with at most `budget` bits, never more.

    cost: float64 [rows, options], >= 0, inf where an option is not allowed. bits: int64 of the
    same shape, or [options] for all rows. groups: int64 [rows]; rows of one group take the same
    option. band: how many rows nearest the Lagrangian price are solved exactly. seconds: cap on
    CP-SAT in its deterministic seconds (2 to 5 on the clock), so that equal inputs give equal
    choices; it stops sooner at a proven gap of 1e-7.

    Each row's lower convex hull of (bits, cost) is climbed in order of cost saved per bit until
    the budget ends, which also gives the price of a bit and the bound; CP-SAT then re-solves the
    rows least decided at that price. This replaces the two levels of the LowRA paper (ICML 2025,
    section 6).

    Raises:
        BudgetError: `budget` is below the sum of the narrowest options; names the interval.
        SolverError: shapes differ, a cost is NaN or negative, or a row has no allowed option.
    """
    cost, bits = _checked_options(cost, bits)
    if groups is not None:
        return _solve_grouped(cost, bits, budget, np.asarray(groups), band, seconds)
    return _refine(relax(cost, bits, budget), band, seconds)


def solve_two_level(
    mse: Floats,
    sizes: Ints,
    widths: tuple[int, ...],
    budget_bits_per_weight: float,
    *,
    clusters: int = 128,
    seed: int = 0,
) -> Assignment:
    """The paper's assigner to the letter: LowRA (ICML 2025), section 6, algorithm 1.

    mse: float64 [rows, widths], mean squared error of a row at each width. sizes: int64 [rows],
    weights per row. The budget is split between the sizes in proportion to their weights; per
    size, K-means clusters the rows on their errors (scaling: see `kmeans`), an integer program
    says how many rows of each cluster get each width, and a min-cost flow says which rows.

    The result's `cost` is the sum of squared errors, `bits` counts codes only (width x size), and
    `bound` is the Lagrangian bound of the program with neither clusters nor split.

    Raises:
        BudgetError: the budget is below the narrowest width; names the interval.
        SolverError: shapes differ, an error is not finite or negative, a size is below 1, or
            CP-SAT found no solution.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    mse, bits = _checked_options(mse, sizes[:, None] * np.asarray(widths, dtype=np.int64))
    if (sizes < 1).any() or not np.isfinite(mse).all():
        row = int(((sizes < 1) | ~np.isfinite(mse).all(axis=1)).argmax())
        raise SolverError(f"row {row}: size {sizes[row]}, errors {mse[row].tolist()} not finite")
    if not budget_bits_per_weight >= min(widths):
        raise BudgetError(
            f"a budget of {budget_bits_per_weight:g} bits per weight cannot be met: "
            f"the reachable interval is [{min(widths)}, {max(widths)}] bits per weight"
        )
    cost = mse * sizes[:, None]
    exact_budget = Fraction(str(float(min(budget_bits_per_weight, max(widths)))))
    choice = np.zeros(len(mse), dtype=np.int64)
    for size in np.unique(sizes).tolist():
        rows = np.flatnonzero(sizes == size)
        units = math.floor(exact_budget * len(rows))  # budget of the partition / size
        labels = kmeans(mse[rows], clusters, seed=seed)
        counts = _cluster_counts(mse[rows] * size, labels, widths, units)
        choice[rows] = _split_clusters(mse[rows], labels, counts)
    whole = relax(cost, bits, math.floor(exact_budget * int(sizes.sum())))
    return assignment_of(whole.cost, whole.bits, choice, whole.plan.bound)


def _checked_options(cost: Floats, bits: Ints) -> tuple[Floats, Ints]:
    cost = np.asarray(cost, dtype=np.float64)
    if cost.ndim != 2 or not cost.shape[1]:
        raise SolverError(f"costs must be [rows, options], got shape {cost.shape}")
    bits = np.asarray(bits, dtype=np.int64)
    if bits.shape not in (cost.shape, cost.shape[1:]):
        raise SolverError(f"bits of shape {bits.shape} do not match costs of shape {cost.shape}")
    wrong = ~(cost >= 0)  # NaN compares as false
    if wrong.any():
        row, option = np.argwhere(wrong)[0].tolist()
        raise SolverError(f"row {row}, option {option}: cost {cost[row, option]} is not >= 0")
    closed = ~np.isfinite(cost).any(axis=1)
    if closed.any():
        raise SolverError(f"row {int(closed.argmax())} has no allowed option")
    return cost, np.broadcast_to(bits, cost.shape)


def _solve_grouped(
    cost: Floats, bits: Ints, budget: int, groups: Ints, band: int, seconds: float
) -> Assignment:
    """Sum each group into one row, solve, and give every row its group's option."""
    if groups.shape != cost.shape[:1]:
        raise SolverError(f"{groups.shape} group ids do not match {len(cost)} rows")
    names, member = np.unique(groups, return_inverse=True)
    shape = (len(names), cost.shape[1])
    group_cost, group_bits = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    np.add.at(group_cost, member, cost)
    np.add.at(group_bits, member, bits)
    closed = ~np.isfinite(group_cost).any(axis=1)
    if closed.any():
        raise SolverError(f"group {names[closed.argmax()]} has no option allowed for all its rows")
    plan = solve_knapsack(group_cost, group_bits, budget, band=band, seconds=seconds)
    return replace(plan, choice=plan.choice[member])


def _refine(relaxed: Relaxed, band: int, seconds: float) -> Assignment:
    """Re-solve the least decided rows exactly, the others fixed; keep the better plan.

    A few rows first: the closer the plan, the fewer options can still improve on it.
    """
    plan = relaxed.plan
    margin = _margins(relaxed.excess, plan.choice)
    for size in (min(band, FIRST_BAND), band):
        if size < 1 or plan.cost - plan.bound <= NEGLIGIBLE * plan.cost:
            break
        rows = _least_decided(margin, plan.cost - plan.bound, size, relaxed.broken)
        plan = _improve(relaxed, plan, rows, margin, seconds / 2)
    return plan


def _improve(
    relaxed: Relaxed, plan: Assignment, rows: Ints, margin: Floats, seconds: float
) -> Assignment:
    picks, gain = _solve_band(relaxed, plan, rows, seconds)
    choice = relaxed.plan.choice.copy()
    choice[rows] = picks
    better = assignment_of(relaxed.cost, relaxed.bits, choice, plan.bound, plan.price)
    if better.cost >= plan.cost:
        better = plan
    if np.delete(margin, rows).min(initial=np.inf) <= better.cost - plan.bound:
        return better
    # Every other row is pinned: leaving its option costs more than could still be saved. So what
    # CP-SAT proved of the band holds for the whole program.
    bound = min(better.cost, max(plan.bound, relaxed.plan.cost - gain))
    return replace(better, bound=bound)


def _margins(excess: Floats, choice: Ints) -> Floats:
    """Per row, the excess cost of its second-best option."""
    margin = np.full(len(choice), np.inf)
    for option, values in enumerate(excess):
        np.minimum(margin, np.where(choice == option, np.inf, values), out=margin)
    return margin


def _least_decided(margin: Floats, missing: float, band: int, broken: int) -> Ints:
    """The `band` rows of smallest margin, ties nearest to the break first; sorted by row."""
    rank = min(band, len(margin)) - 1
    limit = min(float(np.partition(margin, rank)[rank]), missing * (1 + NEGLIGIBLE))
    rows = np.flatnonzero(margin <= limit)
    order = np.lexsort((np.abs(rows - broken), margin[rows]))[:band]
    return np.sort(rows[order])


def _solve_band(
    relaxed: Relaxed, plan: Assignment, rows: Ints, seconds: float
) -> tuple[Ints, float]:
    """CP-SAT over `rows`: the option of each, and a proven cap on what they can save."""
    choice, hint = relaxed.plan.choice[rows], plan.choice[rows]
    missing = plan.cost - plan.bound
    delta = relaxed.cost[:, rows] - relaxed.cost[choice, rows]
    rise = relaxed.bits[:, rows] - relaxed.bits[choice, rows]
    keep = relaxed.excess[:, rows] <= missing * (1 + NEGLIGIBLE)
    keep[choice, np.arange(len(rows))] = True
    option, place = np.nonzero(keep)
    unit = max(int(np.gcd.reduce(rise[keep])), 1)
    scale = INTEGER_RANGE / max(float(np.abs(delta[keep]).max()), TINY)
    saved = np.floor(delta[keep] * scale).astype(np.int64)  # floors keep the bound a bound
    model = cp_model.CpModel()
    takes = [model.new_bool_var("") for _ in saved]
    for column in range(len(rows)):
        model.add_exactly_one(takes[index] for index in np.flatnonzero(place == column))
    for take, taken in zip(takes, (hint[place] == option).tolist(), strict=True):
        model.add_hint(take, taken)
    heights = (rise[keep] // unit).tolist()
    model.add(cp_model.LinearExpr.weighted_sum(takes, heights) <= relaxed.slack // unit)
    total = cp_model.LinearExpr.weighted_sum(takes, saved.tolist())
    model.add(total >= math.floor((plan.bound - relaxed.plan.cost) * scale) - len(rows))
    model.minimize(total)
    solver = _solver(seconds)
    solver.parameters.absolute_gap_limit = NEGLIGIBLE * relaxed.plan.cost * scale
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return hint, math.inf
    picked = np.array([solver.boolean_value(take) for take in takes])
    picks = choice.copy()
    picks[place[picked]] = option[picked]
    return picks, -solver.best_objective_bound / scale


def _solver(seconds: float) -> cp_model.CpSolver:
    """A CP-SAT solver whose result depends on its input only, not on the clock."""
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_deterministic_time = seconds
    return solver


def _cluster_counts(cost: Floats, labels: Ints, widths: tuple[int, ...], units: int) -> Ints:
    """How many rows of each cluster get each width, int64 [clusters, widths].

    cost: float64 [rows, widths]; units: the most that the widths of all rows may sum to.
    """
    members = np.bincount(labels)
    sums = [np.bincount(labels, column) for column in cost.T]
    mean = np.stack(sums, axis=1) / members[:, None]
    largest = max(float(mean.max()), TINY)
    scaled = np.rint(mean * min(INTEGER_RANGE, INTEGER_TOTAL / len(cost)) / largest)
    model = cp_model.CpModel()
    counts = [[model.new_int_var(0, size, "") for _ in widths] for size in members.tolist()]
    for row, size in zip(counts, members.tolist(), strict=True):
        model.add(cp_model.LinearExpr.sum(row) == size)
    flat = [count for row in counts for count in row]
    spent = cp_model.LinearExpr.weighted_sum(flat, list(widths) * len(counts))
    model.add(spent <= units)
    model.minimize(cp_model.LinearExpr.weighted_sum(flat, scaled.astype(np.int64).ravel().tolist()))
    solver = _solver(2.0)
    solver.parameters.relative_gap_limit = CLUSTER_GAP
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise SolverError(f"CP-SAT found no widths for {len(cost)} rows in {units} width units")
    return np.array([[solver.value(count) for count in row] for row in counts], dtype=np.int64)


def _split_clusters(cost: Floats, labels: Ints, counts: Ints) -> Ints:
    """Which rows of each cluster get which width: int64 [rows], at least cost, exact counts."""
    choice = np.zeros(len(labels), dtype=np.int64)
    order = np.argsort(labels, kind="stable")
    clusters = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    for rows, demand in zip(clusters, counts, strict=True):
        open_widths = np.flatnonzero(demand)
        choice[rows] = open_widths[_transport(cost[np.ix_(rows, open_widths)], demand[open_widths])]
    return choice


def _transport(cost: Floats, demand: Ints) -> Ints:
    """Give `demand[p]` rows option p at least cost; float64 [rows, options] -> int64 [rows]."""
    rows, options = cost.shape
    if options == 1:
        return np.zeros(rows, dtype=np.int64)
    extra = cost - cost.min(axis=1, keepdims=True)
    scaled = np.rint(extra * (INTEGER_RANGE / max(float(extra.max()), TINY)))
    row, option = np.divmod(np.arange(rows * options), options)
    flow: Any = min_cost_flow.SimpleMinCostFlow()  # its stubs mistake dtypes for shapes
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        row, rows + option, np.ones_like(row), scaled.astype(np.int64).ravel()
    )
    supply = np.concatenate([np.ones(rows, dtype=np.int64), -demand])
    flow.set_nodes_supplies(np.arange(rows + options), supply)
    if flow.solve() != flow.OPTIMAL:
        raise SolverError(f"the flow of {rows} rows to widths {demand.tolist()} has no solution")
    return np.asarray(flow.flows(arcs)).reshape(rows, options).argmax(axis=1).astype(np.int64)
