"""quantize-adapters: packed factors as facts, and their values in the adapters that run."""

from __future__ import annotations

import pytest
import torch

from lowra.compiler.errors import BudgetError, RecipeError
from lowra.compiler.facts import Adapter, Packed, Statistics
from lowra.compiler.packed_adapter import PackedSite
from lowra.compiler.pipeline import parse_pipeline, print_pipeline, run_pipeline
from lowra.compiler.printer import print_program
from lowra.compiler.program import Program
from lowra.passes import PASSES, FitCodebooks, InitializeAdapters, QuantizeAdapters, QuantizeWeights
from lowra.passes.rounding.moments import output_error
from tests.passes.site_programs import CyclicWidths, compiled

BEFORE = (
    FitCodebooks((2,), -1, True), CyclicWidths(), QuantizeWeights(True), InitializeAdapters(4),
)  # fmt: skip


def adapted() -> Program:
    return compiled(BEFORE)


@pytest.mark.parametrize(
    "step",
    [
        QuantizeAdapters(bits=3.0),
        QuantizeAdapters("loraquant", 3, 0.9, 32),
        QuantizeAdapters("loraquant", 2, 0.8, 32, clip="none"),
    ],
)
def test_adapters_take_the_values_of_the_packed_factors(step: QuantizeAdapters) -> None:
    before = adapted()
    after = run_pipeline(before, (step,))
    for site in after.sites:
        packed, adapter = after.fact(site.name, PackedSite), after.fact(site.name, Adapter)
        a, b = packed.dense()
        assert torch.equal(adapter.lora_a.float(), a.to(adapter.lora_a.dtype).float())
        assert torch.equal(adapter.lora_b.float(), b.to(adapter.lora_b.dtype).float())
        assert adapter.scaling == before.fact(site.name, Adapter).scaling
        base = after.fact(site.name, Packed)
        left = after.weight(site) - base.weight.dequantize() - adapter.scaling * b @ a
        assert adapter.error * base.energy == pytest.approx(
            output_error(left, after.fact(site.name, Statistics).load(site.k)), rel=1e-4
        )


def test_the_budget_holds_for_all_sites_together() -> None:
    after = run_pipeline(adapted(), (QuantizeAdapters(bits=2.5),))
    packed = [after.fact(site.name, PackedSite) for site in after.sites]
    stored = sum(site.stored_bits() for site in packed)
    assert stored <= 2.5 * sum(site.parameters for site in packed)


def test_a_program_without_adapters_stays_as_it_is() -> None:
    program = compiled(BEFORE[:-1])
    after = run_pipeline(program, (QuantizeAdapters(),))
    assert all(after.find(site.name, PackedSite) is None for site in after.sites)


def test_the_pass_prints_and_parses() -> None:
    step = QuantizeAdapters("loraquant", 3, 0.9, 128)
    assert parse_pipeline(print_pipeline((step,)), PASSES) == (step,)


def test_what_is_packed_is_printed(golden) -> None:
    text = print_program(run_pipeline(adapted(), (QuantizeAdapters(bits=3.0),)))
    golden.check(
        "\n".join(line for line in text.splitlines() if "adapter" in line or "[" in line) + "\n"
    )


def test_wrong_options_are_refused_before_anything_runs() -> None:
    for step, error in (
        (QuantizeAdapters("rtn"), RecipeError),
        (QuantizeAdapters("loraquant", 2.5), RecipeError),
        (QuantizeAdapters(bits=-1), BudgetError),
        (QuantizeAdapters(group=0), RecipeError),
    ):
        with pytest.raises(error):
            step.require(adapted())
