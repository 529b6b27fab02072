"""The bits of a plan are those that its packed weights, adapters and corrections take."""

from __future__ import annotations

import pytest

from lowra.compiler.correction import correction_bits
from lowra.compiler.facts import AdapterRank, Packed, Precision
from lowra.compiler.program import Program
from lowra.passes import FitCodebooks, QuantizeWeights
from lowra.passes.budget.plan_bits import Counted, plan_bits
from tests.passes.site_programs import CyclicWidths, compiled


def packed(scale_bits: int = 16) -> Program:
    fit = FitCodebooks((1, 1.6, 2, 4), scale_bits=scale_bits)
    return compiled((fit, CyclicWidths(), QuantizeWeights(feedback=False)), rotated=False)


def bits_of(program: Program, counted: Counted) -> int:
    plan = {site.name: program.fact(site.name, Precision) for site in program.sites}
    return plan_bits(program, plan, counted)


def stored(program: Program) -> int:
    return sum(program.fact(site.name, Packed).weight.stored_bits() for site in program.sites)


@pytest.mark.parametrize("scale_bits", [16, 8])
def test_a_plan_costs_what_its_packed_weights_take(scale_bits: int) -> None:
    program = packed(scale_bits)
    assert bits_of(program, Counted()) == stored(program)


def test_counted_adapters_cost_16_bits_per_factor_value() -> None:
    program = packed()
    values = sum(site.n + site.k for site in program.sites)
    assert bits_of(program, Counted(adapter_rank=3)) == stored(program) + 16 * 3 * values


def test_a_rank_chosen_for_a_site_goes_before_the_common_one() -> None:
    program = packed()
    first, *others = program.sites
    program = program.with_facts({first.name: [AdapterRank(0)]})
    values = sum(site.n + site.k for site in others)
    assert bits_of(program, Counted(adapter_rank=3)) == stored(program) + 16 * 3 * values


def test_corrections_cost_their_exact_bits() -> None:
    program = packed()
    beside = sum(correction_bits(site.n, site.k, 2, 8) for site in program.sites)
    counted = Counted(correction_rank=2, correction_bits=8)
    assert beside > 0 and bits_of(program, counted) == stored(program) + beside
