"""LowRA's learner, step by step on a row of eight weights worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowra.compiler.facts import Adapter, Codebooks, Packed, Precision
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.rotation import Rotation
from lowra.passes import FitCodebooks, InitializeAdapters, QuantizeWeights
from lowra.passes.fit_codebooks import paper_codebooks
from lowra.passes.initialize_adapters import closed_form
from lowra.passes.rounding.feedback import nearest_codes
from lowra.passes.rounding.paper_mappings import block_absmax, learn_mapping, start_mapping
from lowra.passes.rounding.quantizer import quantize
from lowra.recipe import Recipe
from tests.passes.site_programs import CyclicWidths, site_program

# Blocks of 4 with absmax 2 and 4, which are also the weights of the samples:
#   x = .5 -1 .25 1 | 1 -.25 .5 -1      weights 2 2 2 2 | 4 4 4 4
ROW = torch.tensor([[1.0, -2.0, 0.5, 2.0, 4.0, -1.0, 2.0, -4.0]])
PAPER_PASSES = ["fit-codebooks", "assign-precision", "quantize-weights", "initialize-adapters"]
FLAT = torch.tensor([[1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0]])


def normalized(weight: Tensor) -> tuple[Tensor, Tensor]:
    absmax = block_absmax(weight, 4).repeat_interleave(4, 1)
    return weight / absmax, absmax


def close(got: Tensor, want: list[float]) -> None:
    expected = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-7)


def test_scales_are_the_absmax_of_blocks() -> None:
    assert block_absmax(ROW, 4).tolist() == [[2.0, 4.0]]
    assert block_absmax(torch.zeros(1, 8), 4).tolist() == [[0.0, 0.0]]


def test_the_start_is_that_of_listing_1() -> None:
    one, two, four = (start_mapping(b, 2) for b in (1, 2, 4))
    assert one.levels.tolist() == [[-1.0, 1.0]] * 2 and one.thresholds.tolist() == [[0.0]] * 2
    assert two.levels[1].tolist() == [-1.0, 0.0, 0.3379, 1.0]
    assert two.thresholds[1].tolist() == [-0.5, 0.16895762, 0.66895762]
    assert four.levels[0, 8:10].tolist() == [0.0795803, 0.1609302]
    close(four.thresholds[0, 7:9], [0.03979015, 0.12025525])


def test_one_iteration_at_one_bit() -> None:
    """x <= 0: -1 (2), -.25 (4), -1 (4): -7 / 10. x > 0: .5 .25 1 (2 each), 1 .5 (4): 9.5 / 14."""
    mapping = learn_mapping(*normalized(ROW), 1, "none", iterations=1)
    close(mapping.levels[0], [-0.7, 9.5 / 14])
    close(mapping.thresholds[0], [(-0.7 + 9.5 / 14) / 2])


def test_two_iterations_at_two_bits() -> None:
    """-1 and -1; -.25; .5 (2) .25 (2) .5 (4): 3.5 / 8; 1 and 1. The second changes no bin."""
    mapping = learn_mapping(*normalized(ROW), 2, "none")
    close(mapping.levels[0], [-1.0, -0.25, 0.4375, 1.0])
    close(mapping.thresholds[0], [-0.625, 0.09375, 0.71875])


def test_the_second_iteration_moves_what_the_first_brought_across() -> None:
    """x = -.2 .1 .3 1 1. First: -.2 | (.1 + .3 + 2) / 4 = .6, threshold .2, which .1 is below.
    Second: -.1 / 2 = -.05 | 2.3 / 3, threshold .3583, which .3 is below. A third would move it."""
    values = torch.tensor([[-0.2, 0.1, 0.3, 1.0, 1.0]]), torch.ones(1, 5)
    close(learn_mapping(*values, 1, "none", iterations=1).levels[0], [-0.2, 0.6])
    close(learn_mapping(*values, 1, "none").levels[0], [-0.05, 2.3 / 3])
    close(learn_mapping(*values, 1, "none").thresholds[0], [(-0.05 + 2.3 / 3) / 2])
    close(learn_mapping(*values, 1, "none", iterations=3).levels[0], [0.2 / 3, 1.0])


def test_thresholds_averaged_over_iterations() -> None:
    """(t0 + t1 + t2) / 3 with t2 = t1, the starting thresholds among them; levels stay."""
    mapping = learn_mapping(*normalized(ROW), 2, "iterations")
    close(mapping.levels[0], [-1.0, -0.25, 0.4375, 1.0])
    close(
        mapping.thresholds[0],
        [(-0.5 - 1.25) / 3, (0.16895762 + 0.1875) / 3, (0.66895762 + 1.4375) / 3],
    )


def test_thresholds_averaged_over_channels() -> None:
    """The second row is -1 (2 of 8) and 1: its levels are -1 and 1, its own threshold 0."""
    mapping = learn_mapping(*normalized(torch.cat((ROW, FLAT))), 1, "channels")
    close(mapping.levels.flatten(), [-0.7, 9.5 / 14, -1.0, 1.0])
    shared = (-0.7 + 9.5 / 14) / 4
    close(mapping.thresholds.flatten(), [shared, shared])


def test_an_empty_bin_keeps_its_level() -> None:
    """FLAT has nothing in the two middle bins: 0 and .3379 stay."""
    close(learn_mapping(*normalized(FLAT), 2, "none").levels[0], [-1.0, 0.0, 0.3379, 1.0])


def test_error_of_a_row_is_that_of_its_weights() -> None:
    """Lost: 2 (.5 - .4375), 2 (.25 - .4375), 4 (.5 - .4375): .015625 + .140625 + .0625 over 8."""
    books = paper_codebooks(ROW, (2,), 4, "iterations")
    assert float(books.loss) == pytest.approx(0.21875 / 8)


def test_rounding_uses_the_thresholds_that_the_learner_ends_with() -> None:
    """Last threshold -.0107, averaged over iterations -.0071: -.009 lies between."""
    weight = torch.tensor([[-0.018, 2.0, -2.0, 2.0, 4.0, -1.0, 2.0, -4.0]])
    rows = torch.ones(1, dtype=torch.uint8)
    for average, code in (("none", 1), ("iterations", 0)):
        books = paper_codebooks(ROW, (1,), 4, average)
        assert books.thresholds is not None and books.scales is not None
        codes = nearest_codes(weight, books.levels[1], books.scales[1], 4, books.thresholds[1])
        assert int(codes[0, 0]) == code
        packed = quantize(weight, None, books, rows, Rotation())
        want = 2 * float(books.levels[1][0, code])
        assert float(packed.dequantize()[0, 0]) == pytest.approx(want, abs=1e-3)


def test_a_value_on_a_threshold_goes_below_it() -> None:
    codes = nearest_codes(
        torch.tensor([[0.25, 0.26]]), torch.tensor([[0.0, 1.0]]), None, 0, torch.tensor([[0.25]])
    )
    assert codes.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("reading", "base"), [("kept", 4 * 0.75**5), ("relearned", 3.0)], ids=["kept", "relearned"]
)
def test_loftq_alternates_five_times_and_quantizes_first(reading: str, base: float) -> None:
    """W = (4, 2): absmax 4, x = (1, .5), upper level .75: Q1 = (3, 3). A row's residual has rank 1,
    so B1 A1 = W - Q1 and what is quantized next is Q1 itself, all of one value v: absmax v.

    kept: level .75 still, so Q2 = .75 v, and Q5 = 4 x .75^5. relearned: level 1, so Q5 = Q1.
    """
    recipe = Recipe(bit_budget=1, preset="lowra", widths=(1,), group=2, rank=1,
                    loftq_mappings=reading)  # fmt: skip
    program = site_program({"a": torch.tensor([[4.0, 2.0], [8.0, 4.0]])})
    steps = [step for step in recipe.passes() if step.name in PAPER_PASSES]
    assert [step.name for step in steps] == PAPER_PASSES
    done = run_pipeline(program, steps)
    adapter = done.fact("a", Adapter)
    product = adapter.scaling * adapter.lora_b @ adapter.lora_a
    got = done.fact("a", Packed).weight.dequantize()
    torch.testing.assert_close(got, torch.tensor([[base] * 2, [2 * base] * 2]), rtol=0, atol=1e-6)
    left = [4 - base, 2 - base]
    torch.testing.assert_close(product, torch.tensor([left, [2 * x for x in left]]))


@pytest.mark.parametrize("relearn", [False, True], ids=["kept", "relearned"])
def test_loftq_requantizes_with_the_mappings_asked_for(relearn: bool) -> None:
    """Two alternations: Q1 = quant(W), B1 A1 = SVD(W - Q1), Q2 = quant(W - B1 A1), SVD again."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    fit = FitCodebooks((1, 2), 16, False, "paper")
    first = run_pipeline(
        site_program({"a": weight}), (fit, CyclicWidths(), QuantizeWeights(feedback=False))
    )
    step = InitializeAdapters(rank=2, alpha=2.0, rule="loftq", iterations=2, relearn=relearn)
    done = run_pipeline(first, (step,))
    b, a = closed_form(weight - first.fact("a", Packed).weight.dequantize(), torch.eye(32), 2)
    target = weight - b @ a
    fresh = paper_codebooks(target, (1, 2), 16, "iterations")
    kept = first.fact("a", Codebooks)
    widths = first.fact("a", Precision).row_widths
    got = done.fact("a", Packed).weight.dequantize()
    own = quantize(target, None, fresh, widths, Rotation()).dequantize()
    assert torch.equal(got, own) == relearn
    assert fresh.scales is not None and kept.thresholds is not None
    if not relearn:
        levels = got[0].view(2, 16) / fresh.scales[1][0].unsqueeze(1)
        assert {round(x, 3) for x in levels.flatten().tolist()} == {
            round(x, 3) for x in kept.levels[1][0].tolist()
        }
    adapter = done.fact("a", Adapter)
    b, a = closed_form(weight - got, torch.eye(32), 2)
    torch.testing.assert_close(adapter.lora_b @ adapter.lora_a, b @ a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("average", ["iterations", "channels", "none"])
@pytest.mark.parametrize("what", ["zero", "constant", "outlier", "few values"])
def test_odd_rows_give_finite_ascending_mappings(what: str, average: str) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    weight[1] = {"zero": torch.zeros(64), "constant": torch.full((64,), 0.7),
                 "outlier": weight[1].index_fill(0, torch.tensor([5]), 3e4),
                 "few values": weight[1].sign()}[what]  # fmt: skip
    books = paper_codebooks(weight, (1, 2, 4), 32, average)
    assert bool(torch.isfinite(books.loss).all()) and books.thresholds is not None
    for width in (1, 2, 4):
        for table in (books.levels[width], books.thresholds[width]):
            assert bool(torch.isfinite(table).all()) and bool((table.diff(dim=1) >= 0).all())
        rows = torch.full((3,), width, dtype=torch.uint8)
        value = quantize(weight, None, books, rows, Rotation()).dequantize()
        assert bool(torch.isfinite(value).all())
        if what == "zero":
            assert not bool(value[1].any())
