"""A plan stands only where it is no worse, on held-out tokens, than one width for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from lowra.compiler.facts import Assigned, Codebooks, Precision, Proof
from lowra.compiler.packing import width_id
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.spill import Spill
from lowra.passes import (
    AssignPrecision,
    CollectStatistics,
    CompareUniform,
    FitCodebooks,
    RotateInputs,
    compare_uniform,
)
from tests.compiler.captured import normalized
from tests.models import tokens
from tests.passes.chain import X, chain

FIT = (RotateInputs(), CollectStatistics(), FitCodebooks((1, 2, 3)))


@dataclass(frozen=True)
class Upside(Pass):
    """Half the rows of each site at 3 bits and half at 1: what no sensible planner would choose."""

    name: ClassVar[str] = "upside"
    reads: ClassVar = (Codebooks,)
    writes: ClassVar = (Precision, Assigned)

    def run(self, program: Program) -> Program:
        facts: dict[str, list[object]] = {}
        for site in program.sites:
            widths = torch.tensor([width_id(3), width_id(1)], dtype=torch.uint8).repeat(site.n // 2)
            facts[site.name] = [Precision(widths), Assigned(1.0, Proof(3.0, 10, 20))]
        return program.with_facts(facts)


def held(folder: Path | None = None) -> Program:
    return replace(
        chain()[1], calibration=((X[:300],),), held_out=((X[300:],),), spill=Spill(folder)
    )


def compared(plan: Pass, compare: Pass, program: Program | None = None) -> Program:
    return run_pipeline(held() if program is None else program, (*FIT, plan, compare))


def widths_of(program: Program) -> set[float]:
    return {w for s in program.sites for w in program.fact(s.name, Precision).histogram()}


def test_a_plan_worse_than_one_width_for_all_is_replaced() -> None:
    done = compared(Upside(), CompareUniform(budget=3.0))
    assert widths_of(done) == {2}
    for site in done.sites:
        assigned = done.fact(site.name, Assigned)
        assert assigned.comparison is not None and assigned.comparison.width == 2
        assert assigned.comparison.uniform < assigned.comparison.mixed
        books = done.fact(site.name, Codebooks)
        assert assigned.loss == pytest.approx(float(books.loss[:, 1].sum()))
        assert assigned.proof.bound is None and assigned.proof.budget == 20
        assert assigned.proof.bits <= 3.0 * sum(s.weights for s in done.sites)


def test_a_good_plan_stands_and_carries_the_comparison() -> None:
    done = compared(AssignPrecision(2.9), CompareUniform(budget=2.9))
    assert len(widths_of(done)) > 1
    assigned = done.fact("last", Assigned)
    assert assigned.comparison is not None and assigned.comparison.width == 2
    assert assigned.comparison.mixed <= assigned.comparison.uniform
    assert assigned.proof.bound is not None


@pytest.mark.parametrize("lacking", ["held out", "graph", "budget"])
def test_what_cannot_be_compared_stands_as_it_is(lacking: str) -> None:
    program = held()
    if lacking == "held out":
        program = replace(program, held_out=())
    done = run_pipeline(program, (*FIT, Upside()))
    if lacking == "graph":
        done = replace(done, graph=None)
    after = run_pipeline(done, (CompareUniform(budget=0.5 if lacking == "budget" else 3.0),))
    assert after.facts == done.facts


def test_a_finished_comparison_is_read_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compared(Upside(), CompareUniform(budget=3.0), held(tmp_path))

    def refuse(*_: object) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr(compare_uniform, "_measure", refuse)
    again = compared(Upside(), CompareUniform(budget=3.0), held(tmp_path))
    assert again.fact("last", Assigned) == first.fact("last", Assigned)


def test_a_language_model_is_judged_by_its_next_token_distribution() -> None:
    model, program = normalized("llama")
    batches = [tuple(tokens(model, 4, 16, seed=seed).values()) for seed in (1, 2)]
    program = replace(program, calibration=(batches[0],), held_out=(batches[1],), spill=Spill())
    done = compared(Upside(), CompareUniform(budget=4.0), program)
    found = done.fact(done.sites[0].name, Assigned).comparison
    assert program.causal and found is not None
    assert 0 < found.uniform < 0.5 and 0 < found.mixed < 0.5
