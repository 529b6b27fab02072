"""rotate-inputs: give each input a randomised Hadamard transform, where that pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowra.compiler.dataflow import siblings
from lowra.compiler.errors import RecipeError
from lowra.compiler.facts import RotationTrial, Statistics
from lowra.compiler.packing import width_id
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, largest_block, rotate, rotate_gram
from lowra.compiler.storage import ROW_SCALES
from lowra.passes.fit_codebooks import FitCodebooks, row_weight
from lowra.passes.rounding.feedback import feedback_codes
from lowra.passes.rounding.moments import InputMoments, moments_of
from lowra.passes.rounding.quantizer import row_tables
from lowra.passes.rounding.refine import Rounded

RULES = ("always", "measured", "never")
TRIAL_ROWS = 48
"""Rows per site that are rounded with and without the rotation."""
TRIAL_WIDTH = 2
"""Bits they are rounded to: where budgets that need a planner lie, and errors differ most."""


@dataclass(frozen=True)
class RotateInputs(Pass):
    """Decide seed and block of the input rotation per site (QuIP#, arXiv 2402.04396).

    Rotated rows are close to Gaussian, so a codebook shared by a panel and one scale per row serve
    as well as a codebook per row. The block is the largest power of two that divides k (64 for
    576, 512 for 1536), or 1, which is no rotation. Sites that share an input share its rotation.

    rule "always" takes the largest block, "never" block 1. "measured" rounds a sample of 48 rows
    per site to 2 bits with error feedback, in both coordinates, on plain codes in the layout that
    the file will have (`group`, `shared` as in fit-codebooks), and keeps the block with the smaller
    output error, rows weighted by their sensitivity where it is known. On a tie nothing is rotated:
    a rotation costs time in every forward pass. It reads Statistics, and leaves a RotationTrial
    where it had a choice. Data-free, the largest block is taken: nothing is known of the inputs,
    and Gaussian rows are what the codebooks start from. The cost is two factorizations of k x k per
    distinct input: 0.06 CPU seconds at k = 576, 0.4 at 1536 (2026-11-24), some 17 for the 120 of
    SmolLM2-135M.
    """

    name: ClassVar[str] = "rotate-inputs"
    writes: ClassVar = (Rotation,)
    seed: int = 0
    rule: str = "always"
    group: int = ROW_SCALES
    shared: bool = True

    def run(self, program: Program) -> Program:
        if self.rule not in RULES:
            raise RecipeError(f"rotate-inputs: rule={self.rule!r} is not one of {', '.join(RULES)}")
        if self.rule == "measured":
            return self._measured(program)
        return program.with_facts(
            {
                site.name: [Rotation(self.seed, largest_block(site.k) if self._always else 1)]
                for site in program.sites
            }
        )

    @property
    def _always(self) -> bool:
        return self.rule == "always"

    def _measured(self, program: Program) -> Program:
        facts: dict[str, list[object]] = {}
        groups = siblings(program)
        with stage("rotations", len(groups)) as bar:
            for group in groups:
                decided = self._decide(program, group)
                facts |= {site.name: decided for site in group}
                bar.advance()
        return program.with_facts(facts)

    def _decide(self, program: Program, group: Sequence[Site]) -> list[object]:
        """The rotation of the sites that share an input, and how it was found."""
        block = largest_block(group[0].k)
        if block == 1 or program.fact(group[0].name, Statistics).gram is None:
            return [Rotation(self.seed, block)]
        found = [program.fact(site.name, Statistics) for site in group]
        sources = (str(s and s.path.name) for f in found for s in (f.gram, f.sensitivity))
        key = (repr(self), program.fingerprint, *sources, *(site.name for site in group))
        stored = program.spill.tensors(key, lambda: {"losses": self._try(program, group, block)})
        trial = RotationTrial(dict(zip((1, block), stored["losses"].tolist(), strict=True)))
        return [Rotation(self.seed, trial.best), trial]

    def _try(self, program: Program, group: Sequence[Site], block: int) -> Tensor:
        """float64 [2]: the share of its output energy that the sample loses at block 1, `block`."""
        gram = program.fact(group[0].name, Statistics).load(group[0].k)
        sample = [self._rows(program, site, gram) for site in group]
        energy = sum(float(cost @ _errors(rows, gram)) for _, rows, cost in sample)
        losses: list[float] = []
        for rotation in (Rotation(self.seed, 1), Rotation(self.seed, block)):
            moments = moments_of(rotate_gram(gram, rotation) if rotation.active else gram)
            losses.append(
                sum(
                    float(cost @ self._rounded(site, rotate(rows, rotation), moments))
                    for site, rows, cost in sample
                )
            )
        return torch.tensor(losses, dtype=torch.float64) / (energy or 1.0)

    def _rows(self, program: Program, site: Site, gram: Tensor) -> tuple[Site, Tensor, Tensor]:
        """A site, an even sample of its rows [s, k], and what an error of each costs [s]."""
        weight = program.weight(site)
        cost = row_weight(program.fact(site.name, Statistics), weight, gram)[:, 0]
        even = torch.linspace(0, site.n - 1, min(site.n, TRIAL_ROWS)).round().long().unique()
        return site, weight[even], cost[even]

    def _rounded(self, site: Site, rows: Tensor, moments: InputMoments) -> Tensor:
        """float64 [s]: output errors of rows [s, k], rounded in the coordinates of `moments`."""
        fit = FitCodebooks(widths=(TRIAL_WIDTH,), group=self.group, shared=self.shared)
        books = fit.fitted(rows, moments.factor.conditional_variance(), site)
        widths = torch.full((len(rows),), width_id(TRIAL_WIDTH), dtype=torch.uint8)
        tables, scales = row_tables(books, widths)
        codes = feedback_codes(rows, moments.factor, tables, scales, self.group)
        return _errors(rows - Rounded(codes, tables, scales, self.group).values(), moments.gram)


def _errors(error: Tensor, gram: Tensor) -> Tensor:
    """e G e' of each row of [s, k]: float64 [s]."""
    return ((error @ gram) * error).sum(1, dtype=torch.float64)
