"""Codebooks of every kind: storable, better with every bit, and honest about their loss."""

from __future__ import annotations

import math

import pytest
import torch

from lowra.compiler.errors import PipelineError, RecipeError, WeightError
from lowra.compiler.facts import Codebooks, Statistics
from lowra.compiler.packing import levels_of, width_id
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.storage import scale_groups
from lowra.passes import FitCodebooks
from lowra.passes.rounding.quantizer import quantize
from tests.passes.site_programs import (
    compiled,
    compiled_afresh,
    correlated_gram,
    site_program,
    two_sites,
)

WIDTHS = (1, 1.6, 2, 3, 4)
KINDS = [
    ("default", 0, False), ("default", -1, False), ("default", -1, True),
    ("default", 32, False), ("default", 32, True), ("paper", -1, False), ("paper", 32, False),
]  # fmt: skip


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(("rule", "group", "shared"), KINDS)
def test_codebooks_can_be_stored_and_lose_less_with_every_bit(
    rule: str, group: int, shared: bool, rotated: bool
) -> None:
    program = compiled((FitCodebooks(WIDTHS, group, shared, rule),), rotated)
    for site in program.sites:
        books = program.fact(site.name, Codebooks)
        assert books.widths == WIDTHS and books.group == group and books.shared == shared
        assert books.loss.dtype == torch.float64 and books.loss.shape == (site.n, 5)
        assert bool((books.loss >= 0).all()) and bool((books.loss.sum(0).diff() < 0).all())
        for width in WIDTHS:
            levels = books.levels[width]
            count = levels_of(width_id(width))
            assert levels.shape == ((count,) if shared else (site.n, count))
            assert torch.equal(levels.half().float(), levels)
            assert bool((levels.diff(dim=-1) >= 0).all())
            if books.scales is None:
                assert group == 0
                continue
            scales = books.scales[width]
            assert scales.shape == (site.n, scale_groups(site.k, group))
            assert torch.equal(scales.half().float(), scales) and bool((scales > 0).all())


@pytest.mark.parametrize(("rule", "group", "shared"), KINDS)
def test_expected_loss_is_what_plain_rounding_loses_without_data(
    rule: str, group: int, shared: bool
) -> None:
    """The Gram matrix is the identity, so feedback has nothing to compensate."""
    weights, _ = two_sites()
    program = run_pipeline(site_program(weights), (FitCodebooks(WIDTHS, group, shared, rule),))
    for site in program.sites:
        books, weight = program.fact(site.name, Codebooks), weights[site.name]
        for column, width in enumerate(WIDTHS):
            rows = torch.full((site.n,), width_id(width), dtype=torch.uint8)
            value = quantize(weight, None, books, rows, Rotation()).dequantize()
            lost = (weight - value).double().square().sum(1)
            lost /= site.k if rule == "paper" else float(weight.double().square().sum())
            torch.testing.assert_close(books.loss[:, column], lost, rtol=0.03, atol=1e-6)


def test_one_bit_and_two_bits_of_gaussian_rows_lose_what_theory_says() -> None:
    weights = {"a": torch.randn(24, 256, generator=torch.Generator().manual_seed(0))}
    program = run_pipeline(site_program(weights), (FitCodebooks((1, 2)),))
    loss = program.fact("a", Codebooks).loss.sum(0).tolist()
    assert loss == pytest.approx([1 - 2 / math.pi, 0.1175], rel=0.1)


def test_trellis_codes_of_gaussian_rows_lose_less() -> None:
    """Of 64 states, and of runs of 64 rows that begin without a past (Marcellin and Fischer, 1990,
    table III: 5.38 and 10.84 dB without an end)."""
    weights = {"a": torch.randn(128, 256, generator=torch.Generator().manual_seed(0))}
    program = run_pipeline(site_program(weights), (FitCodebooks((1, 2, 3), trellis=True),))
    loss = program.fact("a", Codebooks).loss.sum(0).tolist()
    assert loss == pytest.approx([0.292, 0.0825, 0.0231], rel=0.05)


def test_trellis_codebooks_have_twice_as_many_levels() -> None:
    program = compiled((FitCodebooks(WIDTHS, trellis=True),), True)
    for site in program.sites:
        books = program.fact(site.name, Codebooks)
        assert [len(books.levels[b]) for b in WIDTHS] == [4, 3, 8, 16, 16]
        assert books.ids == (11, 9, 12, 13, 4) and str(books.layout) == "row16-shared16-trellis"
        assert all(bool((levels.diff() >= 0).all()) for levels in books.levels.values())
    for wrong in (FitCodebooks((2,), shared=False, trellis=True), FitCodebooks(
        (2,), rule="paper", trellis=True
    )):  # fmt: skip
        with pytest.raises(RecipeError, match="trellis codes need shared codebooks"):
            compiled_afresh((wrong,), False)


def test_own_codebooks_lose_no_more_than_shared_ones() -> None:
    weights, _ = two_sites()
    own, shared = (
        run_pipeline(site_program(weights), (FitCodebooks(WIDTHS, -1, kind),))
        for kind in (False, True)
    )
    for site in own.sites:
        mine, theirs = (p.fact(site.name, Codebooks).loss.sum(0) for p in (own, shared))
        assert bool((mine <= theirs * 1.01).all())


def test_loss_is_a_share_of_the_output_energy() -> None:
    """Weights or inputs ten times as large lose the same share."""
    weight, gram = torch.randn(6, 32), correlated_gram(32)
    losses = []
    for w, g in ((weight, gram), (8 * weight, gram), (weight, 64 * gram)):
        program = run_pipeline(site_program({"a": w}, {"a": g}), (FitCodebooks(WIDTHS),))
        losses.append(program.fact("a", Codebooks).loss)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0.02, atol=1e-6)


def test_default_rule_weighs_columns_by_their_inputs_and_the_papers_does_not() -> None:
    weight = torch.randn(5, 32)
    loud = torch.diag(torch.cat((torch.full((16,), 100.0), torch.full((16,), 0.01))))
    results = {}
    for rule, shared in (("default", True), ("paper", False)):
        step = FitCodebooks((2,), -1, shared, rule)
        quiet = run_pipeline(site_program({"a": weight}), (step,)).fact("a", Codebooks)
        heard = run_pipeline(site_program({"a": weight}, {"a": loud}), (step,)).fact("a", Codebooks)
        results[rule] = torch.equal(quiet.levels[2], heard.levels[2])
    assert results == {"default": False, "paper": True}


def test_scales_of_the_paper_are_the_largest_value_of_their_group() -> None:
    weights, _ = two_sites()
    program = compiled((FitCodebooks((1, 2), 32, False, "paper"),))
    for site in program.sites:
        scales = program.fact(site.name, Codebooks).scales
        assert scales is not None and torch.equal(scales[1], scales[2])
        for row in range(site.n):
            parts = weights[site.name][row].split(32)
            want = torch.stack([part.abs().max() for part in parts]).half().float()
            assert torch.equal(scales[1][row], want)


def test_fitting_twice_gives_the_same_bits() -> None:
    for rule, group, shared in KINDS[1:4:2]:
        step = FitCodebooks((1, 3), group, shared, rule)
        first, second = compiled((step,)), compiled_afresh((step,))
        for site in first.sites:
            a, b = first.fact(site.name, Codebooks), second.fact(site.name, Codebooks)
            assert torch.equal(a.loss, b.loss) and torch.equal(a.levels[3], b.levels[3])


def test_codebooks_are_fitted_in_rotated_coordinates() -> None:
    weights, _ = two_sites()
    turned = {
        name: rotate(w, Rotation(0, 16 if w.shape[1] == 48 else 32)) for name, w in weights.items()
    }
    here = run_pipeline(site_program(weights, rotated=True), (FitCodebooks((2,)),))
    there = run_pipeline(site_program(turned), (FitCodebooks((2,)),))
    for site in here.sites:
        a, b = (p.fact(site.name, Codebooks) for p in (here, there))
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("rule", "group", "shared"), KINDS)
@pytest.mark.parametrize("what", ["a zero row", "all zero", "a constant row", "an outlier"])
def test_odd_weights_have_finite_codebooks(rule: str, group: int, shared: bool, what: str) -> None:
    weight = torch.randn(4, 64)
    if what == "all zero":
        weight.zero_()
    elif what == "an outlier":
        weight[1, 7] = 3000.0
    else:
        weight[1] = 0.0 if what == "a zero row" else 0.7
    program = run_pipeline(
        site_program({"a": weight}), (FitCodebooks(WIDTHS, group, shared, rule),)
    )
    books = program.fact("a", Codebooks)
    assert bool(torch.isfinite(books.loss).all())
    for width in WIDTHS:
        rows = torch.full((4,), width_id(width), dtype=torch.uint8)
        value = quantize(weight, None, books, rows, Rotation()).dequantize()
        assert bool(torch.isfinite(value).all())
        if what in ("a zero row", "all zero"):
            assert float(value[1].abs().max()) < 1e-3


def test_weights_beyond_float16_are_refused_by_name() -> None:
    with pytest.raises(WeightError, match="loud: a codebook value of .* exceeds float16"):
        run_pipeline(
            site_program({"loud": torch.randn(3, 32) * 1e7}), (FitCodebooks((2,), 0, False),)
        )


def test_statistics_of_another_site_do_not_matter() -> None:
    weights, grams = two_sites()
    both = run_pipeline(site_program(weights, grams), (FitCodebooks((2,)),))
    alone = run_pipeline(
        site_program({"up": weights["up"]}, {"up": grams["up"]}), (FitCodebooks((2,)),)
    )
    assert both.fact("up", Statistics).tokens == 100
    assert torch.equal(both.fact("up", Codebooks).loss, alone.fact("up", Codebooks).loss)


@pytest.mark.parametrize("rule", ["default", "paper"])
@pytest.mark.parametrize("shared", [False, True], ids=["per row", "shared"])
def test_every_kind_of_codebook_is_stored_or_refused(rule: str, shared: bool) -> None:
    """Group 0 leaves no room for the scales that a shared or an absmax codebook needs."""
    weight = torch.randn(6, 64) * torch.tensor([1.0, 4, 9, 0.1, 2, 3]).view(-1, 1)
    try:
        program = run_pipeline(site_program({"a": weight}), (FitCodebooks((4,), 0, shared, rule),))
    except (RecipeError, PipelineError):
        return
    books = program.fact("a", Codebooks)
    rows = torch.full((6,), 4, dtype=torch.uint8)
    value = quantize(weight, None, books, rows, Rotation()).dequantize()
    assert float((weight - value).square().sum() / weight.square().sum()) < 0.05
