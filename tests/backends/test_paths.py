"""Best paths against all paths, and the C++ ones against plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.backends.cpu import fitting
from lowra.backends.reference import feedback
from lowra.backends.reference.paths import Rounding, places_of
from lowra.compiler.trellis import codes_of, stored_of
from lowra.passes.rounding.feedback import nearest_codes

DRAWN = settings(max_examples=25, deadline=None, derandomize=True)


def case(n: int, k: int, seed: int) -> tuple[Tensor, ...]:
    """Weight, upper, tables of 4, 8 or 16 levels by run and of 3 for other rows, scales, columns,
    and runs whose rows do not lie together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    upper = torch.randn(k, k, generator=generator).triu(1) * 0.1
    upper += torch.diag(torch.rand(k, generator=generator) + 0.5)
    runs = torch.randint(-1, 1 + n // 40, (n,), generator=generator)
    tables = torch.randn(n, 16, generator=generator).sort(1)[0]
    for run in runs.unique():
        tables[runs == run, 3 if run < 0 else 4 << int(run) % 3 :] = torch.inf
    scales = torch.rand(n, 2, generator=generator) + 0.5
    return weight, upper, tables, scales, torch.arange(k) * 2 // k, runs


def assert_on_paths(codes: Tensor, runs: Tensor) -> None:
    for run in runs[runs >= 0].unique():
        stored_of(codes[runs == run].int())


@pytest.mark.parametrize(("levels", "rows"), [(4, 8), (8, 5), (16, 3)])
def test_a_path_is_the_best_of_all(levels: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    tables = torch.randn(rows, levels, generator=generator).sort(1)[0]
    scale = torch.rand(rows, generator=generator) + 0.5
    rounded = Rounding.of(tables, torch.zeros(rows, dtype=torch.int64))
    every = torch.tensor([*itertools.product(range(levels // 2), repeat=rows)]).T
    values = tables.gather(1, codes_of(every)) * scale[:, None]
    for _ in range(20):
        wanted = 1.5 * torch.randn(rows, generator=generator)
        codes, value = rounded(wanted, scale)
        best = ((values - wanted[:, None]) ** 2).sum(0).min()
        torch.testing.assert_close(((value - wanted) ** 2).sum(), best)
        torch.testing.assert_close(value, tables.gather(1, codes[:, None])[:, 0] * scale)
        stored_of(codes[:, None])


def test_runs_are_found_wherever_their_rows_lie() -> None:
    assert places_of(torch.tensor([7, -1, 3, 7, -1, 3, 3]))[:, :4].tolist() == [
        [2, 5, 6, 7], [0, 3, 7, 7]
    ]  # fmt: skip
    assert places_of(torch.full((3,), -1)).shape == (0, 64)
    with pytest.raises(ValueError, match="a run of 65 rows"):
        places_of(torch.zeros(65, dtype=torch.int64))


@DRAWN
@given(st.integers(1, 150), st.integers(1, 70), st.integers(0, 999), st.booleans())
def test_feedback_on_paths(n: int, k: int, seed: int, spread: bool) -> None:
    weight, upper, *rest, runs = case(n, k, seed)
    given_upper = upper if spread else None
    got = fitting.feedback_codes(weight, given_upper, *rest, runs)
    want = feedback.feedback_codes(weight, given_upper, *rest, runs)
    assert_on_paths(got, runs)
    # Where rounding tips a tie, a whole run goes elsewhere, to errors as large.
    differs = (got != want).any(1)
    assert len(runs[differs].unique()) <= 1 + n // 20
    for run in runs[differs].unique():
        rows = runs == run
        lost = [
            float(((weight - feedback.values_of(*rest, codes).T)[rows] ** 2).sum())
            for codes in (got, want)
        ]
        assert lost[0] == pytest.approx(lost[1], rel=0.2)


def test_a_row_that_stores_zeros_has_no_say_in_the_path_of_its_run() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(64, 30, generator=generator)
    weight[::2] = 0
    levels = torch.tensor([-1.9, -1.1, -0.6, -0.2, 0.2, 0.6, 1.1, 1.9])
    scales = torch.full((64, 1), 0.02)
    scales[::2] = 0
    lost = []
    for rows in (slice(None), slice(1, None, 2)):
        some, scale = weight[rows], scales[rows]
        tables = levels.expand(len(some), -1)
        runs = torch.zeros(len(some), dtype=torch.int64)
        codes = nearest_codes(some, tables.contiguous(), scale, -1, runs=runs)
        lost.append(float(((some - levels[codes] * scale) ** 2).sum()))
    assert lost[0] < lost[1], "rows between leave more paths to choose from"


@DRAWN
@given(st.integers(1, 150), st.integers(2, 60), st.integers(0, 999))
def test_descent_on_paths_never_raises_the_error_of_a_run(n: int, k: int, seed: int) -> None:
    weight, _, tables, scales, columns, runs = case(n, k, seed)
    x = torch.randn(2 * k + 5, k, generator=torch.Generator().manual_seed(seed)) + 0.3
    gram = x.T @ x / len(x)
    groups = torch.where(runs < 0, n + torch.arange(n), runs)
    codes = feedback.feedback_codes(weight, None, tables, scales, columns, runs)
    before = torch.full((2 * n,), torch.inf, dtype=torch.float64)
    for backend in (fitting, feedback, fitting):
        codes, slope = backend.descend_codes(
            weight, gram, tables, scales, columns, codes, None, 1, runs
        )
        assert_on_paths(codes, runs)
        error = (weight - feedback.values_of(tables, scales, columns, codes).T).double()
        torch.testing.assert_close(slope.double(), error @ gram.double(), rtol=1e-3, atol=1e-3)
        rows = ((error @ gram.double()) * error).sum(1)
        now = torch.zeros(2 * n, dtype=torch.float64).index_add_(0, groups, rows)
        assert bool((now <= before * (1 + 1e-4) + 1e-6).all())
        before = now


def test_rows_without_runs_are_rounded_as_ever() -> None:
    weight, upper, tables, scales, columns, runs = case(90, 40, 3)
    alone = (weight, upper, tables, scales, columns)
    for backend in (fitting, feedback):
        some = backend.feedback_codes(*alone, runs)[runs < 0]
        assert torch.equal(some, backend.feedback_codes(*(t[runs < 0] if len(t) == 90 else t
                                                          for t in alone)))  # fmt: skip


def test_results_do_not_depend_on_threads() -> None:
    weight, upper, *rest, runs = case(300, 50, 0)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(fitting.feedback_codes(weight, upper, *rest, runs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
