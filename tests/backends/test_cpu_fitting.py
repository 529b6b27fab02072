"""The C++ kernels that compiling runs on, against their plain-torch meaning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.backends.cpu import fitting, toolchain
from lowra.backends.cpu.tiers import best_tier
from lowra.backends.reference import feedback, lloyd, optimum

pytestmark = pytest.mark.skipif(toolchain.find_compiler() is None, reason="no C++ compiler")
DRAWN = settings(max_examples=40, deadline=None, derandomize=True)
ROWS, COLUMNS, SEEDS = st.integers(1, 150), st.integers(1, 130), st.integers(0, 999)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(n: int, k: int, seed: int, shared_weights: bool) -> tuple[Tensor, Tensor]:
    generator = generator_of(seed)
    values = torch.randn(n, k, generator=generator) * (torch.rand(n, 1, generator=generator) + 0.1)
    values[:, ::5] = values[:, :1].clone()  # ties
    return values, torch.rand(1 if shared_weights else n, k, generator=generator)


def starts_of(widths: list[int], rows: int | None, seed: int) -> list[Tensor]:
    generator = generator_of(seed + 1)
    shapes = [(1 << b,) if rows is None else (rows, 1 << b) for b in widths]
    return [torch.randn(s, generator=generator, dtype=torch.float64).sort(-1)[0] for s in shapes]


@DRAWN
@given(st.integers(0, 700), COLUMNS, st.integers(1, 70), SEEDS, st.sampled_from([1, 2, 3]))
def test_moments(tokens: int, n: int, k: int, seed: int, threads: int) -> None:
    generator = generator_of(seed)
    x, y = (torch.randn(tokens, c, generator=generator).bfloat16() for c in (n, k))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = fitting.moments(x, None), fitting.moments(x, y), fitting.moments(x.double(), None)
    finally:
        torch.set_num_threads(before)
    wanted = x.double().T @ x.double(), x.double().T @ y.double(), x.double().T @ x.double()
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-5 * tokens**0.5)
    assert torch.equal(found[0], found[0].T)


@pytest.mark.skipif("bfloat16" not in best_tier().activations, reason="no bfloat16 products")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_moments_of_a_bad_value_are_bad_where_it_is(bad: float) -> None:
    x = torch.ones(7, 50).bfloat16()
    x[6, 3] = bad
    found = fitting.moments(x, None).isfinite()
    assert not found[3].any() and not found[:, 3].any()
    assert int(found.sum()) == 49 * 49


@DRAWN
@given(ROWS, COLUMNS, SEEDS, st.booleans(), st.sampled_from([1, 2, 60]))
def test_lloyd_rows(n: int, k: int, seed: int, shared: bool, iterations: int) -> None:
    rows, starts = rows_of(n, k, seed, shared), starts_of([1, 2, 3, 4], n, seed)
    got = fitting.lloyd_rows(*rows, starts, iterations, 1e-6)
    want = lloyd.lloyd_rows(*rows, starts, iterations, 1e-6)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@DRAWN
@given(ROWS, COLUMNS, SEEDS, st.booleans(), st.sampled_from([1, 2, 60]))
def test_lloyd_shared_and_scales(n: int, k: int, seed: int, shared: bool, iterations: int) -> None:
    rows, starts = rows_of(n, k, seed, shared), starts_of([1, 2, 3], None, seed)
    got = fitting.lloyd_shared(*rows, starts, iterations, 1e-6)
    want = lloyd.lloyd_shared(*rows, starts, iterations, 1e-6)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
    got_scales = fitting.lloyd_scales(*rows, got[:-1], iterations, 1e-6)
    want_scales = lloyd.lloyd_scales(*rows, got[:-1], iterations, 1e-6)
    torch.testing.assert_close(got_scales, want_scales, rtol=1e-7, atol=1e-9)


@DRAWN
@given(ROWS, st.integers(1, 300), SEEDS, st.booleans())
def test_optimal_levels(n: int, k: int, seed: int, shared: bool) -> None:
    """Equal cuts may tie; what they lose may not differ."""
    rows = rows_of(n, k, seed, shared)
    tables = [fn(*rows, [2, 4, 16]) for fn in (fitting.optimal_levels, optimum.optimal_levels)]
    got, want = (lloyd.lloyd_rows(*rows, table, 1, 0.0)[-1] for table in tables)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def feedback_case(n: int, k: int, groups: int, seed: int) -> tuple[Tensor, ...]:
    generator = generator_of(seed)
    weight = torch.randn(n, k, generator=generator)
    upper = torch.randn(k, k, generator=generator).triu(1) * 0.1
    upper += torch.diag(torch.rand(k, generator=generator) + 0.5)
    tables = torch.randn(n, 16, generator=generator).sort(1)[0]
    for row in range(n):
        tables[row, 2 << row % 4 :] = torch.inf
    scales = torch.rand(n, groups, generator=generator) + 0.5
    return weight, upper, tables, scales, torch.arange(k) * groups // k


@DRAWN
@given(ROWS, COLUMNS, SEEDS, st.sampled_from([0, 1, 3]))
def test_feedback_codes(n: int, k: int, seed: int, groups: int) -> None:
    weight, upper, tables, scales, columns = feedback_case(n, k, max(groups, 1), seed)
    given_scales = scales if groups else None
    got = fitting.feedback_codes(weight, upper, tables, given_scales, columns)
    want = feedback.feedback_codes(weight, upper, tables, given_scales, columns)
    assert got.dtype == torch.uint8
    # A tie that rounding tips sends a row elsewhere; but rows are many and ties are rare.
    assert int((got != want).any(1).sum()) <= 1 + n // 20


def test_wide_tables() -> None:
    weight, upper, _, scales, columns = feedback_case(70, 90, 2, 5)
    tables = torch.randn(70, 256, generator=generator_of(1)).sort(1)[0]
    got = fitting.feedback_codes(weight, upper, tables, scales, columns)
    want = feedback.feedback_codes(weight, upper, tables, scales, columns)
    assert float((got != want).float().mean()) < 0.02


def test_results_do_not_depend_on_threads() -> None:
    rows = rows_of(200, 300, 3, True)
    weight, upper, tables, scales, columns = feedback_case(200, 300, 1, 3)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            levels = fitting.lloyd_shared(*rows, starts_of([2, 4], None, 0), 60, 1e-6)
            codes = fitting.feedback_codes(weight, upper, tables, scales, columns)
            results.append([*levels, *fitting.lloyd_scales(*rows, levels[:-1], 60, 0.0), codes])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_ops_reach_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fitting, "library", lambda name: asked.append(name))
    rows = rows_of(3, 10, 0, True)
    torch.ops.lowra.lloyd_scales(*rows, starts_of([1], None, 0), 5, 0.0)
    torch.ops.lowra.feedback_codes(*feedback_case(3, 10, 1, 0))
    assert asked == ["lloyd", "codes"]


def gram_of(k: int, seed: int) -> Tensor:
    x = torch.randn(2 * k + 5, k, generator=generator_of(seed)) + 0.3
    return x.T @ x / len(x)


@DRAWN
@given(ROWS, COLUMNS, SEEDS, st.sampled_from([0, 1, 3]))
def test_descend_codes(n: int, k: int, seed: int, groups: int) -> None:
    weight, _, tables, scales, columns = feedback_case(n, k, max(groups, 1), seed)
    gram = gram_of(k, seed)
    start = torch.zeros(n, k, dtype=torch.uint8)
    arguments = (weight, gram, tables, scales if groups else None, columns, start)
    got, slope = fitting.descend_codes(*arguments, None, 1)
    want, _ = feedback.descend_codes(*arguments, None, 1)
    assert int((got != want).any(1).sum()) <= 1 + n // 20
    value = tables.gather(1, got.long()) * (scales[:, columns] if groups else 1.0)
    error = (weight - value).double()
    torch.testing.assert_close(slope.double(), error @ gram.double(), rtol=1e-3, atol=1e-3)
    assert int(start.max()) == 0, "the input is not written to"
    for backend in (fitting, feedback):
        codes, known = backend.descend_codes(*arguments, None, 0)
        kept = known.clone()
        assert torch.equal(codes, start)
        again, _ = backend.descend_codes(*arguments, known, 1)
        assert torch.equal(again, backend.descend_codes(*arguments, None, 1)[0])
        assert torch.equal(known, kept), "the slope given is not written to"


@DRAWN
@given(st.integers(1, 70), st.integers(2, 90), SEEDS)
def test_no_sweep_raises_the_output_error(n: int, k: int, seed: int) -> None:
    weight, _, tables, scales, columns = feedback_case(n, k, 2, seed)
    gram = gram_of(k, seed)
    codes = torch.zeros(n, k, dtype=torch.uint8)
    before = torch.full((n,), torch.inf, dtype=torch.float64)
    for _ in range(4):
        value = tables.gather(1, codes.long()) * scales[:, columns]
        error = (weight - value).double()
        now = ((error @ gram.double()) * error).sum(1)
        assert bool((now <= before * (1 + 1e-4) + 1e-6).all())
        before = now
        codes, _ = fitting.descend_codes(weight, gram, tables, scales, columns, codes, None, 1)
