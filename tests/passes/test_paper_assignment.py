"""LowRA's precision assigner (algorithm 1), step by step on eight rows worked out by hand.

Four rows of 10 weights, four of 20, two clusters each. Mean squared errors at 1, 2 and 4 bits:

    size 10   a 21 15   5     b 20 14   3     c 7 3 0       d 5 3 0
    size 20   e 30 10   8     f 26 10   8     g 6.5 5 3     h 5.5 3 3
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowra.compiler.facts import Precision
from lowra.compiler.pipeline import run_pipeline
from lowra.passes import AssignPrecision
from lowra.passes.budget.kmeans import kmeans
from lowra.passes.budget.solver import (
    _cluster_counts,
    _split_clusters,
    solve_knapsack,
    solve_two_level,
)
from lowra.recipe import Recipe
from tests.passes.site_programs import site_program, with_losses

WIDTHS = (1, 2, 4)
SMALL = np.array([[21, 15, 5], [20, 14, 3], [7, 3, 0], [5, 3, 0]], dtype=np.float64)
LARGE = np.array([[30, 10, 8], [26, 10, 8], [6.5, 5, 3], [5.5, 3, 3]])
PAIRS = np.array([0, 0, 1, 1])
"""Clusters {a, b} and {c, d}, and {e, f} and {g, h}."""


def bits_of(choice: np.ndarray, widths: tuple[int, ...] = WIDTHS) -> list[int]:
    return [widths[option] for option in choice.tolist()]


@pytest.mark.parametrize("mse", [SMALL, LARGE], ids=["size 10", "size 20"])
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_pairs_the_rows_that_lose_alike(mse: np.ndarray, seed: int) -> None:
    """In standard deviations a-b and c-d are 1 apart at most, b-c 2.9; e-f, g-h 0.7, f-g 3.1."""
    labels = kmeans(mse, 2, seed=seed).tolist()
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_kmeans_moves_its_centers_until_they_stand() -> None:
    """0 3 7 10, which any two starts bring to {0, 3} and {7, 10}: from 0 and 3, the other two first
    join 3, whose center goes to 6.67, and then 3 is nearer to 0."""
    points = np.array([[0.0], [3.0], [7.0], [10.0]])
    for seed in range(40):
        labels = kmeans(points, 2, seed=seed).tolist()
        assert labels[0] == labels[1] != labels[2] == labels[3]


def test_the_cluster_program_of_the_small_rows() -> None:
    """7 units (1.75 x 4 rows). Means {a, b} 20.5 14.5 4, {c, d} 6 3 0. Widths of the pairs, cost:

    4 1 and 1 1: 24.5 + 12 = 36.5 *     2 2 and 2 1: 29 + 9 = 38     2 2 and 1 1: 29 + 12 = 41
    2 1 and 2 2: 35 + 6 = 41            1 1 and 4 1: 41 + 6 = 47     nothing else fits or is less
    """
    counts = _cluster_counts(SMALL * 10, PAIRS, WIDTHS, 7)
    assert counts.tolist() == [[1, 0, 1], [2, 0, 0]]


def test_the_cluster_program_of_the_large_rows() -> None:
    """Means {e, f} 28 10 8, {g, h} 6 4 3.

    2 2 and 2 1: 20 + 10 = 30 *         4 1 and 1 1: 36 + 12 = 48    2 2 and 1 1: 20 + 12 = 32
    2 1 and 2 2: 38 + 8 = 46            1 1 and 4 1: 56 + 9 = 65
    """
    counts = _cluster_counts(LARGE * 20, PAIRS, WIDTHS, 7)
    assert counts.tolist() == [[0, 2, 0], [1, 1, 0]]


def test_the_program_within_a_cluster_looks_at_what_a_row_saves() -> None:
    """{a, b} has a 1 and a 4: a at 4 leaves 5 + 20 = 25, b at 4 leaves 3 + 21 = 24, so b, though a
    loses more at every width. {g, h} has a 1 and a 2: g at 2 leaves 5 + 5.5, h at 2 leaves 3 + 6.5.
    """
    small = _split_clusters(SMALL, PAIRS, np.array([[1, 0, 1], [2, 0, 0]]))
    assert bits_of(small) == [1, 4, 1, 1]
    large = _split_clusters(LARGE, PAIRS, np.array([[0, 2, 0], [1, 1, 0]]))
    assert bits_of(large) == [2, 2, 1, 2]


def test_all_steps_together() -> None:
    """Rows in the order e a f b g c h d. a1 b4 c1 d1 lose 21 + 3 + 7 + 5 = 36, e2 f2 g1 h2 lose
    10 + 10 + 6.5 + 3 = 29.5. Code bits: 7 x 10 + 7 x 20 = 210 = 1.75 x 120."""
    mse = np.stack([row for pair in zip(LARGE, SMALL, strict=True) for row in pair])
    plan = solve_two_level(mse, np.array([20, 10] * 4), WIDTHS, 1.75, clusters=2)
    assert bits_of(plan.choice) == [2, 1, 2, 4, 1, 1, 2, 1]
    assert plan.bits == 210
    assert plan.cost == pytest.approx(36 * 10 + 29.5 * 20)


def test_the_cluster_program_knows_only_the_mean_of_a_cluster() -> None:
    """1.2 bits for five rows: one row gets a second bit. It saves 8, 0 and 4 in the first three
    rows, 5.5 and 4.5 in the others. Of the means, 4 and 5 (of the sums, 12 and 10, it would be the
    first), the second wins, and in it the fourth row. With a cluster for each row the first wins.
    """
    mse = np.array([[9, 1, 0], [1, 1, 0], [5, 1, 0], [25.5, 20, 19], [24.5, 20, 19]])
    two, five = (
        solve_two_level(mse, np.full(5, 8), WIDTHS, 1.2, clusters=clusters) for clusters in (2, 5)
    )
    assert bits_of(two.choice) == [1, 1, 1, 2, 1]
    assert bits_of(five.choice) == [2, 1, 1, 1, 1]


def test_the_budget_is_split_by_size_before_anything_is_chosen() -> None:
    """Two rows of 10 weights save 9 and 8 per weight by a second bit, two of 20 save 2 and 1.

    1.5 bits per weight: each size gets 3 units for two rows, so one row of each has the second bit.
    Cost 10 (1 + 9) + 20 (1 + 2) = 160 at 30 + 60 bits. Without the split those 90 bits go to both
    rows of 10 (saving 90 and 80 for 10 bits each, against 40 and 20 for 20 bits) and the 10 left
    are too few: cost 10 (1 + 1) + 20 (3 + 2) = 120 at 40 + 40 bits.
    """
    mse, sizes = np.array([[10.0, 1], [3, 1], [9, 1], [2, 1]]), np.array([10, 20, 10, 20])
    plan = solve_two_level(mse, sizes, (1, 2), 1.5, clusters=2)
    assert bits_of(plan.choice) == [2, 2, 1, 1]
    assert (plan.cost, plan.bits) == (pytest.approx(160), 90)
    whole = solve_knapsack(mse * sizes[:, None], sizes[:, None] * np.array([1, 2]), 90)
    assert bits_of(whole.choice) == [2, 1, 2, 1]
    assert (whole.cost, whole.bits) == (pytest.approx(120), 80)


def widths_under(bit_budget: float) -> list[int]:
    """Of a site of a, b, c, d that goes through the assignment of the paper's recipe."""
    recipe = Recipe(bit_budget=bit_budget, preset="lowra")
    step = recipe.assignment()
    assert isinstance(step, AssignPrecision)
    columns = [WIDTHS.index(int(width)) for width in recipe.candidate_widths]
    program = site_program({"s": torch.zeros(4, 10)})
    losses = {"s": torch.from_numpy(SMALL[:, columns])}
    done = run_pipeline(with_losses(program, losses, recipe.candidate_widths), (step,))
    return done.fact("s", Precision).row_widths.tolist()


def test_one_bit_is_not_offered_from_two_bits_up() -> None:
    """At 2 bits all rows have 2, though 8 units buy more with 1 bit allowed: b at 4, a at 2, c and
    d at 1 lose 15 + 3 + 7 + 5 = 30, all at 2 lose 35. At 2.5 bits 10 units hold one 4: b saves 11
    (a 10, c and d 3). At 1.75, a cluster for each row, the answer is that of two clusters above."""
    assert widths_under(1.75) == [1, 4, 1, 1]
    assert widths_under(2.0) == [2, 2, 2, 2]
    assert widths_under(2.5) == [2, 4, 2, 2]
    allowed = solve_two_level(SMALL, np.full(4, 10), WIDTHS, 2.0)
    assert bits_of(allowed.choice) == [2, 4, 1, 1]


def test_the_paper_uses_128_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(points: np.ndarray, clusters: int, *, seed: int) -> np.ndarray:
        asked.append(clusters)
        return kmeans(points, clusters, seed=seed)

    monkeypatch.setattr("lowra.passes.budget.solver.kmeans", counted)
    widths_under(1.75)
    assert asked == [128]
