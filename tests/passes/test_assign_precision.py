"""The budget is a hard cap on what is stored; one out of reach is refused with the interval."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.compiler.correction import Correction, correction_bits
from lowra.compiler.errors import BudgetError, LowraError, PatternError, RecipeError
from lowra.compiler.facts import Assigned, Codebooks, Packed, Precision
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.program import Program
from lowra.passes import (
    AssignPrecision,
    CorrectWeights,
    FitCodebooks,
    QuantizeWeights,
    ReplayPrecision,
)
from tests.passes.site_programs import compiled, site_program, two_sites, with_losses

WIDTHS = (1, 2, 3, 4)


def falling(seed: int) -> dict[str, Tensor]:
    """Losses of the two sites that fall with the width, very different from row to row."""
    random = np.random.default_rng(seed)
    shape = np.array([0.36, 0.12, 0.034, 0.009])
    return {
        name: torch.from_numpy(np.exp(random.normal(0, 2, (rows, 1))) * shape)
        for name, rows in (("up", 13), ("down", 20))
    }


def planned(step: AssignPrecision, seed: int = 0) -> Program:
    program = with_losses(site_program(two_sites()[0]), falling(seed), WIDTHS)
    return run_pipeline(program, (step,))


def widths_of(program: Program, name: str) -> list[int]:
    return program.fact(name, Precision).row_widths.tolist()


def stored_bits(program: Program) -> int:
    """Bits of the tensors that a checkpoint would hold."""
    packed = [program.fact(site.name, Packed).weight.tensors() for site in program.sites]
    return 8 * sum(len(t.numpy().tobytes()) for stored in packed for t in stored.values())


KINDS = [(-1, True), (-1, False), (0, False), (32, True)]


@pytest.mark.parametrize(("group", "shared"), KINDS)
@pytest.mark.parametrize("unit", ["row", "layer"])
def test_what_is_packed_never_exceeds_the_budget(group: int, shared: bool, unit: str) -> None:
    fitted = compiled((FitCodebooks(WIDTHS, group, shared),))
    total, met = sum(site.weights for site in fitted.sites), 0
    for budget in (7.0, 5.0, 4.0, 3.1):
        steps = (AssignPrecision(budget, unit=unit), QuantizeWeights(feedback=False))
        try:
            program = run_pipeline(fitted, steps)
        except BudgetError:
            continue
        met += 1
        assert stored_bits(program) <= budget * total
    assert met >= 2


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.floats(2.6, 6.0), st.integers(0, 9))
def test_budget_holds_and_is_used(budget: float, seed: int) -> None:
    program = planned(AssignPrecision(budget), seed)
    steps = (QuantizeWeights(feedback=False),)
    bits = stored_bits(run_pipeline(program, steps)) / (13 * 48 + 20 * 96)
    assert bits <= budget
    if any(width < 4 for name in ("up", "down") for width in widths_of(program, name)):
        assert bits >= budget - 0.25  # less than one row, one step and the unused codebooks


def test_a_larger_budget_never_loses_more() -> None:
    def lost(budget: float) -> float:
        program = planned(AssignPrecision(budget))
        return sum(
            float(program.fact(site.name, Codebooks).loss[row, width - 1])
            for site in program.sites
            for row, width in enumerate(widths_of(program, site.name))
        )

    losses = [lost(budget) for budget in (2.6, 3.0, 3.6, 4.2, 5.0, 6.0)]
    assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:], strict=False))


def test_louder_rows_get_more_bits() -> None:
    program = planned(AssignPrecision(3.4))
    loss, widths = falling(0)["down"][:, 0], torch.tensor(widths_of(program, "down"))
    assert float(loss[widths >= 3].min()) > float(loss[widths <= 1].max())
    assert program.fact("down", Precision).row_widths.dtype == torch.uint8


def test_pins_fix_the_width_of_matching_sites() -> None:
    program = planned(AssignPrecision(4.0, pins=("up=4",)))
    assert set(widths_of(program, "up")) == {4}
    program = planned(AssignPrecision(6.0, pins=("re:^d=1", "up=3")))
    assert set(widths_of(program, "down")) == {1} and set(widths_of(program, "up")) == {3}


def test_a_pin_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(PatternError, match="pins='downn' matches no weight; nearest: down"):
        planned(AssignPrecision(4.0, pins=("downn=4",)))


@pytest.mark.parametrize("pin", ["up=5", "up=x", "up"])
def test_a_pin_to_no_width_of_the_recipe_is_refused_in_words(pin: str) -> None:
    with pytest.raises(LowraError):
        planned(AssignPrecision(4.0, pins=(pin,)))


@pytest.mark.parametrize("pins", [("ghost=4",), ("up=4",)])
def test_pins_are_not_dropped_in_silence_by_the_papers_rule(pins: tuple[str, ...]) -> None:
    try:
        program = planned(AssignPrecision(2.0, "paper", pins=pins))
    except LowraError:
        return
    assert pins == ("up=4",) and set(widths_of(program, "up")) == {4}


def test_a_layer_gets_one_width_where_the_unit_is_a_layer() -> None:
    program = planned(AssignPrecision(4.0, unit="layer"))
    assert all(len(set(widths_of(program, name))) == 1 for name in ("up", "down"))
    by_row = planned(AssignPrecision(4.0))
    assert len(set(widths_of(by_row, "down"))) > 1


def test_a_budget_out_of_reach_is_refused_with_the_interval_and_the_interval_is_true() -> None:
    with pytest.raises(BudgetError, match="bit_budget=0.5 is out of reach: ") as caught:
        planned(AssignPrecision(0.5))
    least, most = map(float, re.findall(r"(\d+\.\d{3})", str(caught.value)))
    narrow = planned(AssignPrecision(least))
    assert {w for name in ("up", "down") for w in widths_of(narrow, name)} == {1}
    with pytest.raises(BudgetError):
        planned(AssignPrecision(least - 0.002))
    wide = planned(AssignPrecision(most + 0.001))
    assert {w for name in ("up", "down") for w in widths_of(wide, name)} == {4}
    assert 4 in widths_of(planned(AssignPrecision(100.0)), "up")


def test_an_interval_under_pins_names_them() -> None:
    with pytest.raises(BudgetError, match="out of reach with pins down=4: ") as caught:
        planned(AssignPrecision(3.0, pins=("down=4",)))
    least = float(re.findall(r"(\d+\.\d{3}) to", str(caught.value))[0])
    program = planned(AssignPrecision(least, pins=("down=4",)))
    assert set(widths_of(program, "up")) == {1}


def test_adapters_are_charged_to_the_budget_when_counted() -> None:
    rank, budget = 2, 5.0
    free, counted = (
        planned(AssignPrecision(budget)),
        planned(AssignPrecision(budget, adapter_rank=rank)),
    )
    lora = sum(16 * rank * (site.n + site.k) for site in counted.sites)
    total = sum(site.weights for site in counted.sites)
    bits = stored_bits(run_pipeline(counted, (QuantizeWeights(feedback=False),)))
    assert bits + lora <= budget * total
    assert sum(widths_of(counted, "down")) < sum(widths_of(free, "down"))


@pytest.mark.parametrize("bits", [4, 8])
def test_corrections_are_charged_to_the_bit(bits: int) -> None:
    """What rows may take is the budget less what corrections store, whatever the budget."""
    program = planned(AssignPrecision(5.0))
    sites = program.sites
    layouts = {site.name: program.fact(site.name, Codebooks).layout for site in sites}
    plain = AssignPrecision(5.0).row_budget(sites, WIDTHS, layouts)
    step = AssignPrecision(5.0, correction_rank=2, correction_bits=bits)
    stored = sum(correction_bits(site.n, site.k, 2, bits) for site in sites)
    assert step.row_budget(sites, WIDTHS, layouts) == plain - stored
    fitted = compiled((FitCodebooks(WIDTHS, -1, True),))
    total = sum(site.weights for site in fitted.sites)
    for budget in (8.5, 7.0):
        step = AssignPrecision(budget, correction_rank=2, correction_bits=bits)
        try:
            done = run_pipeline(fitted, (step, QuantizeWeights(), CorrectWeights(2, bits)))
        except BudgetError:
            assert bits == 8
            continue
        beside = sum(done.fact(s.name, Correction).stored_bits() for s in done.sites)
        assert stored_bits(done) + beside <= budget * total


@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 3.3, 4.0])
def test_the_papers_rule_counts_code_bits(budget: float) -> None:
    program = planned(AssignPrecision(budget, "paper"))
    code_bits = sum(sum(widths_of(program, site.name)) * site.k for site in program.sites)
    total = sum(site.weights for site in program.sites)
    assert code_bits <= budget * total
    assert code_bits >= (budget - 0.1) * total


def test_the_papers_rule_refuses_a_budget_below_its_narrowest_width() -> None:
    with pytest.raises(BudgetError, match=r"0.9 bits per weight .* interval is \[1, 4\]"):
        planned(AssignPrecision(0.9, "paper"))


@pytest.mark.parametrize("rule", ["default", "paper"])
def test_the_same_losses_give_the_same_widths(rule: str) -> None:
    first, second = (planned(AssignPrecision(3.0, rule), seed=5) for _ in range(2))
    for site in first.sites:
        assert widths_of(first, site.name) == widths_of(second, site.name)


def test_one_width_needs_no_choice() -> None:
    losses = {name: loss[:, 1:2] for name, loss in falling(0).items()}
    program = with_losses(site_program(two_sites()[0]), losses, (2,))
    done = run_pipeline(program, (AssignPrecision(4.0),))
    assert set(widths_of(done, "up")) == {2}


def test_rows_that_lose_nothing_take_no_bits_from_others() -> None:
    losses = falling(1)
    losses["up"] = torch.zeros(13, 4)
    program = with_losses(site_program(two_sites()[0]), losses, WIDTHS)
    done = run_pipeline(program, (AssignPrecision(3.4),))
    assert set(widths_of(done, "up")) == {1}


def test_the_proof_adds_up() -> None:
    program = planned(AssignPrecision(3.4))
    facts = [program.fact(site.name, Assigned) for site in program.sites]
    proof = facts[0].proof
    assert all(fact.proof == proof for fact in facts)
    assert sum(fact.loss for fact in facts) == pytest.approx(proof.loss)
    assert proof.bound is not None and proof.bound <= proof.loss
    assert proof.gap is not None and 0 <= proof.gap < 1e-6
    assert proof.bits <= proof.budget and proof.price is not None and proof.price > 0


def test_the_price_of_a_bit_is_what_more_budget_saves() -> None:
    """Over a step of one row, the loss falls by about the price times the bits bought."""
    here, more = (planned(AssignPrecision(b)).fact("up", Assigned).proof for b in (3.4, 3.6))
    saved = (here.loss - more.loss) / (more.bits - here.bits)
    assert here.price is not None and more.price is not None
    assert more.price * 0.5 <= saved <= here.price * 2


def test_a_budget_between_two_plans_of_a_layer_is_met_from_below() -> None:
    proofs = {b: planned(AssignPrecision(b, unit="layer")).fact("up", Assigned).proof
              for b in (3.0, 3.05, 3.1, 3.15)}  # fmt: skip
    assert all(proof.bits <= proof.budget for proof in proofs.values())
    assert len({proof.bits for proof in proofs.values()}) < len(proofs)


def test_siblings_without_a_graph_are_refused() -> None:
    with pytest.raises(RecipeError, match="needs the model's graph.*made by hand.*unit='layer'"):
        planned(AssignPrecision(4.0, unit="siblings"))


def test_a_refusal_bills_the_pins() -> None:
    with pytest.raises(BudgetError, match="the pin down=4 takes 3.* bits per weight .*1 sites"):
        planned(AssignPrecision(3.0, pins=("down=4",)))


@pytest.mark.parametrize(
    ("group", "shared", "compact"),
    [(-1, True, (8, 16)), (-1, True, (4, 8)), (32, True, (8, 8)), (32, False, (4, 8))],
)
def test_a_replay_counts_what_is_packed_in_fewer_bits(
    group: int, shared: bool, compact: tuple[int, int]
) -> None:
    fit = FitCodebooks((1, 1.6, 3), group, shared, "default", "iterations", *compact)
    done = compiled((fit, AssignPrecision(6.0, pins=("down=1.6",)), QuantizeWeights()))
    proof = done.fact("up", Assigned).proof
    again = run_pipeline(done, (ReplayPrecision(6.0),)).fact("up", Assigned).proof
    assert again.bits == stored_bits(done) and again.loss == pytest.approx(proof.loss)


def test_ternary_rows_are_priced_pinned_and_named_as_others() -> None:
    widths = (1, 1.6, 2)
    losses = {name: loss[:, :3] for name, loss in falling(0).items()}
    program = with_losses(site_program(two_sites()[0]), losses, widths)
    done = run_pipeline(program, (AssignPrecision(6.0, pins=("up=1.6",)),))
    assert done.fact("up", Precision).row_widths.unique().tolist() == [9]
    assert done.fact("up", Precision).histogram() == {1.6: 13}
    with pytest.raises(RecipeError, match=r"knows no width 1\.6"):
        run_pipeline(program, (AssignPrecision(2.0, "paper"),))
