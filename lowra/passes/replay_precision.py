"""replay-precision: the widths of an earlier plan, held against codebooks and budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lowra.compiler.correction import correction_bits
from lowra.compiler.errors import BudgetError, PlanError
from lowra.compiler.facts import AdapterRank, Assigned, Codebooks, Precision, Proof
from lowra.compiler.packing import width_id
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.compiler.storage import row_bits, site_bits


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
        losses: dict[str, float] = {}
        bits = 0
        for site in program.sites:
            books = program.fact(site.name, Codebooks)
            for width, rows in program.fact(site.name, Precision).histogram().items():
                if width not in books.widths:
                    raise PlanError(
                        f"the plan gives {site.name} the width {width}, which its recipe does not "
                        f"fit: {books.widths}; write the plan again"
                    )
                bits += rows * row_bits(site.k, width, books.group, books.shared, books.compact)
            losses[site.name] = _loss(books, program.fact(site.name, Precision))
            used = tuple(program.fact(site.name, Precision).histogram())
            bits += site_bits(site.n, used, books.shared, books.compact, books.group, site.k)
            bits += 16 * self._rank(program, site.name) * (site.n + site.k)
            bits += correction_bits(site.n, site.k, self.correction_rank, self.correction_bits)
        weights = sum(site.weights for site in program.sites)
        if self.budget and bits > self.budget * weights:
            raise BudgetError(
                f"the plan stores {bits / weights:.3f} bits per weight, more than its own "
                f"bit_budget={self.budget:g}: it was edited; write the plan again"
            )
        proof = Proof(sum(losses.values()), bits, int(self.budget * weights))
        return program.with_facts({name: [Assigned(loss, proof)] for name, loss in losses.items()})

    def _rank(self, program: Program, name: str) -> int:
        chosen = program.find(name, AdapterRank)
        return self.adapter_rank if chosen is None else chosen.rank


def _loss(books: Codebooks, precision: Precision) -> float:
    """The sum of the rows' expected losses at their widths."""
    column = torch.zeros(256, dtype=torch.int64)
    for index, width in enumerate(books.widths):
        column[width_id(width)] = index
    picked = column[precision.row_widths.long()].unsqueeze(1)
    return float(books.loss.gather(1, picked).sum())
