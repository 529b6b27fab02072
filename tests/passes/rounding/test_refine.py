"""Codebooks in closed form against least squares written out, and against trying neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.compiler.storage import NO_SCALES, ROW_SCALES
from lowra.passes.rounding import refine as refining
from lowra.passes.rounding.feedback import nearest_codes
from lowra.passes.rounding.refine import SETTLED, Rounded, refine, relevelled, rescaled
from lowra.passes.rounding.refit import refit_levels
from tests.passes.site_programs import correlated_gram

DRAWN = settings(max_examples=30, deadline=None, derandomize=True)


def case(n: int, k: int, count: int, seed: int) -> tuple[Tensor, Tensor, Rounded, Tensor]:
    """Weight, gram, a poor rounding with two scales per row, and its slope."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    gram = correlated_gram(k, seed)
    tables = torch.randn(count, generator=generator).sort()[0].expand(n, -1).contiguous()
    codes = torch.randint(count, (n, k), generator=generator)
    scales = torch.rand(n, 2, generator=generator) + 0.5
    state = Rounded(codes, tables, scales, (k + 1) // 2)
    return weight, gram, state, (weight - state.values()) @ gram


def without_groups(state: Rounded, scales: int) -> Rounded:
    """The same codes with a scale per row, or with none."""
    assert state.scales is not None
    kept = state.scales[:, :1].contiguous() if scales else None
    return Rounded(state.codes, state.tables, kept, ROW_SCALES if scales else NO_SCALES)


def errors(weight: Tensor, gram: Tensor, state: Rounded) -> Tensor:
    e = (weight - state.values()).double()
    return ((e @ gram.double()) * e).sum(1)


def design(state: Rounded, gram: Tensor) -> Tensor:
    """[n, k, L]: L' D with gram = L L', so that plain least squares knows the metric."""
    scales = state.column_scales()
    assert scales is not None
    hot = torch.nn.functional.one_hot(state.codes, state.tables.shape[1]) * scales.unsqueeze(2)
    return torch.linalg.cholesky(gram.double()).T @ hot.double()


@DRAWN
@given(st.integers(1, 4), st.integers(8, 24), st.sampled_from([2, 3, 4]), st.integers(0, 99))
def test_a_rows_levels_are_those_of_least_squares(n: int, k: int, count: int, seed: int) -> None:
    weight, gram, state, slope = case(n, k, count, seed)
    got = refit_levels(gram, slope, state.codes, state.tables, state.column_scales())
    target = weight.double() @ torch.linalg.cholesky(gram.double())
    for row in range(n):
        used = state.codes[row].unique()
        matrix = design(state, gram)[row][:, used]
        want = torch.linalg.lstsq(matrix, target[row].unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(got[row, used].double(), want, rtol=1e-3, atol=1e-3)
        unused = torch.tensor([level not in used for level in range(count)])
        assert torch.equal(got[row][unused], state.tables[row][unused])


@DRAWN
@given(st.integers(2, 4), st.integers(8, 24), st.integers(0, 99))
def test_a_panels_levels_are_those_of_least_squares_over_its_rows(
    n: int, k: int, seed: int
) -> None:
    weight, gram, state, slope = case(n, k, 4, seed)
    got = refit_levels(gram, slope, state.codes, state.tables, state.column_scales(), True)
    target = (weight.double() @ torch.linalg.cholesky(gram.double())).flatten()
    want = torch.linalg.lstsq(design(state, gram).flatten(0, 1), target.unsqueeze(1)).solution
    torch.testing.assert_close(got.double(), want.T.expand(n, -1), rtol=1e-3, atol=1e-3)


def test_a_rows_slope_after_its_scale_is_known_without_a_product() -> None:
    weight, gram, state, _ = case(5, 24, 4, 3)
    state = without_groups(state, 1)
    assert state.scales is not None
    state.scales[2] = 0.0
    image, slope = weight @ gram, (weight - state.values()) @ gram
    energy, error = (image * weight).sum(1), errors(weight, gram, state).float()
    best = refining._Judged(weight, image, energy, state, slope, error)
    fresh = rescaled(weight, energy, state, slope)
    assert not torch.equal(fresh.scales, state.scales)
    known = refining._slope_after(best, fresh)
    torch.testing.assert_close(known, (weight - fresh.values()) @ gram, rtol=1e-4, atol=1e-4)
    grouped = replace(state, scales=torch.ones(5, 2), group=12)
    assert refining._slope_after(best, grouped) is None


def test_no_step_away_from_the_closed_forms_is_better() -> None:
    weight, gram, state, _ = case(3, 16, 4, 5)
    codes = nearest_codes(weight, state.tables, state.scales, state.group)
    state = replace(state, codes=codes)
    slope = (weight - state.values()) @ gram
    tables = refit_levels(gram, slope, state.codes, state.tables, state.column_scales())
    best = Rounded(state.codes, tables, state.scales, state.group)
    energy = ((weight @ gram) * weight).sum(1)
    scaled = rescaled(weight, energy, state, slope)
    assert scaled.scales is not None
    for level in range(4):
        for step in (-0.02, 0.02):
            moved = tables.clone()
            moved[:, level] += step
            other = Rounded(state.codes, moved, state.scales, state.group)
            assert bool((errors(weight, gram, other) >= errors(weight, gram, best)).all())
    for factor in (0.98, 1.02):
        other = Rounded(state.codes, state.tables, scaled.scales * factor, state.group)
        assert bool((errors(weight, gram, other) >= errors(weight, gram, scaled)).all())


def test_rows_of_several_widths_keep_their_padding_and_wide_tables_stay() -> None:
    weight, gram, state, _ = case(3, 40, 32, 2)
    tables = state.tables.clone()
    tables[0, 2:] = torch.inf
    tables[1, 4:] = torch.inf
    codes = torch.stack((state.codes[0] % 2, state.codes[1] % 4, state.codes[2]))
    state = Rounded(codes, tables, state.scales, state.group)
    slope = (weight - state.values()) @ gram
    fresh = relevelled(gram, state, slope)
    assert torch.equal(torch.isfinite(fresh.tables), torch.isfinite(tables))
    assert torch.equal(fresh.tables[2], tables[2].half().float())
    assert bool((fresh.tables[0, :2].diff() >= 0).all())
    assert bool((errors(weight, gram, fresh)[:2] < errors(weight, gram, state)[:2]).all())


@DRAWN
@given(st.integers(1, 5), st.integers(4, 30), st.sampled_from([2, 4]), st.integers(0, 99),
       st.sampled_from(["any", "singular", "zero"]), st.sampled_from([0, 1, 2]))  # fmt: skip
def test_refining_never_raises_a_rows_error(
    n: int, k: int, count: int, seed: int, kind: str, scales: int
) -> None:
    weight, gram, state, _ = case(n, k, count, seed)
    if kind == "singular":
        gram = torch.ones(k, 1) @ torch.ones(1, k)
    elif kind == "zero":
        weight[0] = 0.0
    if scales < 2:
        state = without_groups(state, scales)
    before = errors(weight, gram, state)
    for rounds in (0, 1, 2):
        done = refine(weight, gram, state, rounds)
        now = errors(weight, gram, done)
        assert bool(torch.isfinite(done.values()).all())
        assert bool((now <= before * (1 + 1e-4) + 1e-4).all())


@pytest.mark.parametrize("shared", [False, True])
def test_shared_codebooks_are_left_alone_by_refine(shared: bool) -> None:
    weight, gram, state, _ = case(4, 24, 4, 1)
    state = Rounded(state.codes, state.tables, state.scales, state.group, shared)
    done = refine(weight, gram, state, 2)
    assert torch.equal(done.tables, state.tables) == shared


@pytest.mark.parametrize("shared", [False, True])
def test_refining_goes_on_until_errors_settle(shared: bool) -> None:
    """Two rounds leave something on the table; where refine stops by itself, a further round
    brings no more than it calls settled."""
    weight, gram, state, _ = case(24, 96, 4, 3)
    state = Rounded(state.codes, state.tables, state.scales, state.group, shared)
    two, done = (refine(weight, gram, state, rounds) for rounds in (2, 100))
    again = refine(weight, gram, done, 1)
    before, least, most = (float(errors(weight, gram, s).sum()) for s in (two, done, again))
    assert least < (1 - SETTLED) * before
    assert most >= (1 - SETTLED) * least
