"""Low-rank parts: alternation never raises the output error, and keeps the best it saw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowra.backends.reference  # noqa: F401 - the ops get their meaning
from lowra.compiler.storage import ROW_SCALES, PackedWeight, pack_weight
from lowra.passes.rounding.feedback import DAMPING
from lowra.passes.rounding.low_rank import Factors, alternate, closed_form, two_sided
from tests.passes.site_programs import correlated_gram, output_loss


def rounded(weight: Tensor) -> PackedWeight:
    """Two levels a row, the mean magnitude up and down."""
    levels = {1: torch.tensor([-1.0, 1.0])}
    codes = (weight > 0).long()
    widths = torch.ones(weight.shape[0], dtype=torch.uint8)
    return pack_weight(codes, widths, levels, weight.abs().mean(1, keepdim=True), ROW_SCALES)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 12), k=st.integers(2, 40), rank=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_alternation_never_raises_the_output_error(n: int, k: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, gram = torch.randn(n, k, generator=generator), correlated_gram(k, seed)
    rank = min(rank, n, k)

    def fit(error: Tensor) -> Factors:
        return Factors(*closed_form(error, gram, rank))

    base = rounded(weight)
    splits = [alternate(weight, gram, base, fit, rounded, rounds) for rounds in range(4)]
    errors = [split.error for split in splits]
    assert errors == sorted(errors, reverse=True)
    for split in splits:
        left = weight - split.base.dequantize() - split.part.product()
        assert split.error == pytest.approx(output_loss(left, gram), rel=1e-3, abs=1e-5)


def test_a_round_that_raises_the_error_is_not_taken_and_is_the_last() -> None:
    weight, gram = torch.randn(6, 32), correlated_gram(32)
    calls: list[int] = []

    def worse(target: Tensor) -> PackedWeight:
        calls.append(1)
        return rounded(10 * target)

    def fit(error: Tensor) -> Factors:
        return Factors(*closed_form(error, gram, 1))

    base = rounded(weight)
    split = alternate(weight, gram, base, fit, worse, 3)
    assert split.base is base and len(calls) == 1


def test_alternation_helps_on_a_case_where_it_can() -> None:
    """A weight of signs plus one strong direction: the base alone cannot see the signs."""
    signs = torch.where(torch.randn(12, 40) > 0, 1.0, -1.0)
    weight = signs + 4 * torch.outer(torch.randn(12), torch.randn(40))
    gram = torch.eye(40)

    def fit(error: Tensor) -> Factors:
        return Factors(*closed_form(error, gram, 1))

    once, more = (alternate(weight, gram, rounded(weight), fit, rounded, r) for r in (0, 3))
    assert more.error < 0.8 * once.error


@pytest.mark.parametrize(("n", "k"), [(10, 24), (24, 10)])
def test_the_two_sided_form_is_the_optimum_of_a_dense_svd(n: int, k: int) -> None:
    """Against a float64 SVD of D^1/2 E G^1/2, G damped as the closed form damps it."""
    error, gram, rows = torch.randn(n, k), correlated_gram(k), torch.rand(n) ** 3 + 0.01
    damped = gram.double() + torch.eye(k) * DAMPING * gram.diagonal().mean()
    values, vectors = torch.linalg.eigh(damped)
    right = vectors @ torch.diag(values.sqrt()) @ vectors.T
    left = torch.diag(rows.double().sqrt())
    u, s, vh = torch.linalg.svd(left @ error.double() @ right)
    best = torch.linalg.inv(left) @ (u[:, :3] * s[:3]) @ vh[:3] @ torch.linalg.inv(right)
    b, a = two_sided(error, gram, rows, 3)
    torch.testing.assert_close(b.double() @ a.double(), best, rtol=1e-3, atol=1e-4)
    weighted = [
        output_loss(rows.sqrt().unsqueeze(1) * (error - x @ y), gram)
        for x, y in ((b, a), closed_form(error, gram, 3))
    ]
    assert weighted[0] < weighted[1]


@pytest.mark.parametrize("kind", ["zeros", "one row alone", "all alike"])
def test_row_weights_may_be_degenerate(kind: str) -> None:
    error, gram, rows = torch.randn(8, 16), correlated_gram(16), torch.zeros(8)
    if kind == "one row alone":
        rows[3] = 1.0
    if kind == "all alike":
        rows = torch.full((8,), 1e-9)
    b, a = two_sided(error, gram, rows, 2)
    assert bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all())
    if kind != "one row alone":
        x, y = closed_form(error, gram, 2)
        torch.testing.assert_close(b @ a, x @ y, rtol=1e-4, atol=1e-5)
