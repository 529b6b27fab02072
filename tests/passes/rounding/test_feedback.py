"""Error feedback against its textbook loop, and what it is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowra.compiler.errors import CalibrationError
from lowra.passes.rounding.feedback import (
    Factor,
    factorize,
    feedback_codes,
    nearest_codes,
    scale_index,
    thresholds_of,
)
from tests.passes.site_programs import correlated_gram, output_loss

GROUPS = [0, -1, 32]


def drawn(n: int, k: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight, ascending tables of 2 and 3 bits (the narrow ones filled up), scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    tables = torch.randn(n, 8, generator=generator).sort(dim=1)[0]
    tables[::2, 4:] = torch.inf
    if group == 0:
        return weight, tables, None
    groups = int(scale_index(k, group)[-1]) + 1
    return weight, tables, torch.rand(n, groups, generator=generator) + 0.5


def values_of(codes: Tensor, tables: Tensor, scales: Tensor | None, group: int) -> Tensor:
    value = tables.gather(1, codes)
    return value if scales is None else value * scales[:, scale_index(codes.shape[1], group)]


def textbook_codes(
    weight: Tensor, gram: Tensor, tables: Tensor, scales: Tensor | None, group: int
) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1) column by column in float64, without blocks."""
    k = weight.shape[1]
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    h = gram.double()[order][:, order]
    h += torch.eye(k) * 0.01 * float(h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).T
    w, codes = weight.double()[:, order].clone(), torch.empty(weight.shape, dtype=torch.int64)
    for i in range(k):
        column = int(order[i])
        scale = torch.ones(len(w)) if scales is None else scales[:, scale_index(k, group)[column]]
        options = tables.double() * scale.double().unsqueeze(1)
        code = (w[:, i : i + 1] - options).abs().argmin(1)
        codes[:, column] = code
        error = (w[:, i] - options[torch.arange(len(w)), code]) / upper[i, i]
        w[:, i + 1 :] -= error[:, None] * upper[i, i + 1 :]
    return codes


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("k", [1, 33, 64, 70, 150])
def test_codes_are_those_of_the_textbook(k: int, group: int) -> None:
    weight, tables, scales = drawn(6, k, group)
    gram = correlated_gram(k, seed=k)
    got = feedback_codes(weight, factorize(gram), tables, scales, group)
    want = textbook_codes(weight, gram, tables, scales, group)
    assert float((got != want).float().mean()) <= 0.01  # float32 may tip a tie


@pytest.mark.parametrize("group", GROUPS)
def test_feedback_with_an_identity_gram_is_plain_rounding(group: int) -> None:
    weight, tables, scales = drawn(5, 70, group)
    codes = feedback_codes(weight, factorize(torch.eye(70)), tables, scales, group)
    assert torch.equal(codes, nearest_codes(weight, tables, scales, group))


@pytest.mark.parametrize("group", GROUPS)
def test_nearest_codes_are_nearest(group: int) -> None:
    weight, tables, scales = drawn(5, 70, group)
    codes = nearest_codes(weight, tables, scales, group)
    factor = torch.ones(5, 70) if scales is None else scales[:, scale_index(70, group)]
    distance = (weight.unsqueeze(2) - tables.unsqueeze(1) * factor.unsqueeze(2)).abs()
    chosen = distance.gather(2, codes.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(chosen, distance.amin(2))
    assert int(codes[::2].max()) < 4, "a narrow row has no wide code"


@pytest.mark.parametrize("group", GROUPS)
def test_feedback_lowers_the_output_error_on_correlated_inputs(group: int) -> None:
    weight, tables, scales = drawn(8, 96, group)
    gram = correlated_gram(96)
    losses = []
    for codes in (
        feedback_codes(weight, factorize(gram), tables, scales, group),
        nearest_codes(weight, tables, scales, group),
    ):
        losses.append(output_loss(weight - values_of(codes, tables, scales, group), gram))
    assert losses[0] < 0.8 * losses[1]


def test_conditional_variance_is_what_later_inputs_leave_open() -> None:
    gram = correlated_gram(20)
    factor = factorize(gram, damping=1e-6)
    order = factor.order
    assert bool((gram.diagonal()[order].diff() <= 0).all())
    got = factor.conditional_variance().double()
    for i, column in enumerate(order.tolist()):
        rest = order[i:]
        left = 1 / torch.linalg.inv(gram.double()[rest][:, rest])[0, 0]
        assert float(got[column]) == pytest.approx(float(left), rel=1e-3)


def test_conditional_variance_without_correlation_is_the_variance() -> None:
    variance = torch.tensor([3.0, 1.0, 2.0, 5.0])
    got = factorize(torch.diag(variance), damping=0.0).conditional_variance()
    torch.testing.assert_close(got, variance)


def test_factor_times_its_transpose_is_the_inverse() -> None:
    gram = correlated_gram(30)
    factor: Factor = factorize(gram)
    damped = gram + torch.eye(30) * 0.01 * gram.diagonal().mean()
    damped = damped[factor.order][:, factor.order].double()
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(30).double(), rtol=0, atol=1e-3)


SINGULAR = {
    "rank one": torch.ones(40, 40),
    "all zero": torch.zeros(40, 40),
    "dead inputs": torch.diag(torch.cat((torch.zeros(30), torch.ones(10)))),
    "fewer tokens than inputs": correlated_gram(160)[:40, :3] @ correlated_gram(160)[:3, :40],
    "slightly negative": torch.ones(40, 40) - 1e-3 * torch.eye(40),
    "huge": correlated_gram(40) * 1e30,
    "tiny": correlated_gram(40) * 1e-30,
}


@pytest.mark.parametrize("what", SINGULAR)
def test_singular_gram_works(what: str) -> None:
    gram = (SINGULAR[what] + SINGULAR[what].T) / 2
    factor = factorize(gram)
    assert bool(torch.isfinite(factor.upper).all())
    assert bool((factor.conditional_variance() > 0).all())
    weight, tables, scales = drawn(4, 40, -1)
    codes = feedback_codes(weight, factor, tables, scales, -1)
    assert int(codes.min()) >= 0 and int(codes.max()) < 8 and int(codes[::2].max()) < 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gram_that_is_not_finite_is_refused(value: float) -> None:
    gram = torch.eye(7)
    gram[2, 2] = value
    with pytest.raises(CalibrationError, match="Gram matrix of size 7 holds NaN or infinity"):
        factorize(gram)


def test_gram_far_from_positive_is_refused() -> None:
    with pytest.raises(CalibrationError, match="size 5 is not positive definite"):
        factorize(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -1e9])))


def test_rows_with_a_scale_of_zero_do_no_harm() -> None:
    weight, tables, scales = drawn(4, 64, 32)
    assert scales is not None
    weight[1, :32], scales[1, 0] = 0.0, 0.0
    codes = feedback_codes(weight, factorize(correlated_gram(64)), tables, scales, 32)
    assert bool(torch.isfinite(values_of(codes, tables, scales, 32)).all())


def test_inputs_are_not_written_to() -> None:
    weight, tables, scales = drawn(4, 64, 32)
    gram = correlated_gram(64)
    given = [weight, tables, scales, gram]
    copies = [tensor.clone() for tensor in given if tensor is not None]
    feedback_codes(weight, factorize(gram), tables, scales, 32)
    nearest_codes(weight, tables, scales, 32)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))  # type: ignore[arg-type]


def test_thresholds_are_midpoints_and_infinity_stays() -> None:
    tables = torch.tensor([[-1.0, 0.0, 4.0, torch.inf, torch.inf]])
    assert thresholds_of(tables).tolist() == [[-0.5, 2.0, torch.inf, torch.inf]]


def test_scale_index_names_the_scale_of_a_column() -> None:
    assert scale_index(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert scale_index(3, 0).tolist() == scale_index(3, -1).tolist() == [0, 0, 0]
