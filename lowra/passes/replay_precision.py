"""replay-precision: the widths of an earlier plan, held against codebooks and budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lowra.compiler.errors import BudgetError, PlanError
from lowra.compiler.facts import Assigned, Codebooks, Precision, Proof
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.passes.budget.plan_bits import Counted, plan_bits


@dataclass(frozen=True)
class ReplayPrecision(Pass):
    """Stands in for assign-precision where Precision facts came with a plan.

    budget: bits per weight over all sites, checked again, since a plan is a file that anyone can
    edit; 0 leaves that out (the paper counts codes alone). Expected losses are taken from the
    codebooks as they were fitted now; nothing is proven about them.
    Raises PlanError for a width without a codebook, BudgetError for a plan beyond its budget.
    """

    name: ClassVar[str] = "replay-precision"
    reads: ClassVar = (Codebooks, Precision)
    writes: ClassVar = (Precision, Assigned)
    budget: float = 0.0
    adapter_rank: int = 0
    correction_rank: int = 0
    correction_bits: int = 4

    def run(self, program: Program) -> Program:
        plan = {site.name: program.fact(site.name, Precision) for site in program.sites}
        losses: dict[str, float] = {}
        for name, precision in plan.items():
            books = program.fact(name, Codebooks)
            for width in precision.histogram():
                if width not in books.widths:
                    raise PlanError(
                        f"the plan gives {name} the width {width}, which its recipe does not "
                        f"fit: {books.widths}; write the plan again"
                    )
            losses[name] = _loss(books, precision)
        counted = Counted(self.adapter_rank, self.correction_rank, self.correction_bits)
        bits = plan_bits(program, plan, counted)
        weights = sum(site.weights for site in program.sites)
        if self.budget and bits > self.budget * weights:
            raise BudgetError(
                f"the plan stores {bits / weights:.3f} bits per weight, more than its own "
                f"bit_budget={self.budget:g}: it was edited; write the plan again"
            )
        proof = Proof(sum(losses.values()), bits, int(self.budget * weights))
        return program.with_facts({name: [Assigned(loss, proof)] for name, loss in losses.items()})


def _loss(books: Codebooks, precision: Precision) -> float:
    """The sum of the rows' expected losses at their widths."""
    column = torch.zeros(256, dtype=torch.int64)
    for index, id in enumerate(books.ids):
        column[id] = index
    picked = column[precision.row_widths.long()].unsqueeze(1)
    return float(books.loss.gather(1, picked).sum())
