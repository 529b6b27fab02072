"""assign-precision: a width per row (or per site) under a hard budget of stored bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from lowra.compiler.errors import BudgetError, RecipeError
from lowra.compiler.facts import Codebooks, Precision
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site, matches, select
from lowra.compiler.progress import stage
from lowra.compiler.storage import row_bits, site_bits

UNREACHABLE = 1 << 40
"""Bits of a row no budget can pay for."""

SOLVER_EFFORT = 0.1
"""Deterministic CP-SAT seconds for the undecided band; the bound is proven whatever it is."""


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Choose widths that minimise the summed expected loss under the budget.

    budget: bits per weight over all sites. rule "default": one multiple-choice knapsack over all
    rows with true stored bits (codes, padding, scales, codebooks, width tags), solved to a proven
    gap. rule "paper": the two-level program of LowRA (ICML 2025, section 6) on code bits alone.
    unit: "row", or "layer" for one width per site. pins: "pattern=width" entries fix the width of
    matching sites; of several, the first wins. adapter_rank: also
    charge 16-bit LoRA factors of that rank to the budget.
    Raises BudgetError with the reachable interval, PatternError for a pin that matches nothing.
    """

    name: ClassVar[str] = "assign-precision"
    reads: ClassVar = (Codebooks,)
    writes: ClassVar = (Precision,)
    budget: float = 2.0
    rule: str = "default"
    unit: str = "row"
    pins: tuple[str, ...] = ()
    adapter_rank: int = 0

    def run(self, program: Program) -> Program:
        books = {site.name: program.fact(site.name, Codebooks) for site in program.sites}
        widths = books[program.sites[0].name].widths
        cost = np.concatenate([books[site.name].loss.numpy() for site in program.sites])
        with stage("precision", None):
            if self.rule == "paper":
                choice = self._paper(program, cost, widths)
            else:
                choice = self._knapsack(program, books, cost, widths)
        chosen = np.asarray(widths, dtype=np.uint8)[choice]
        parts = np.split(chosen, np.cumsum([site.n for site in program.sites])[:-1])
        return program.with_facts(
            {
                site.name: [Precision(torch.from_numpy(part.copy()))]
                for site, part in zip(program.sites, parts, strict=True)
            }
        )

    def _paper(self, program: Program, cost: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
        if self.pins or self.unit != "row" or self.adapter_rank:
            raise RecipeError("rule=paper knows no pins, layers or adapters; use rule=default")
        from lowra.passes.solver import solve_two_level

        sizes = np.concatenate([np.full(site.n, site.k) for site in program.sites])
        return solve_two_level(cost, sizes, widths, self.budget).choice

    def _knapsack(
        self, program: Program, books: dict[str, Codebooks], cost: np.ndarray,
        widths: tuple[int, ...],
    ) -> np.ndarray:  # fmt: skip
        from lowra.passes.solver import solve_knapsack

        first = books[program.sites[0].name]
        bits = np.concatenate(
            [
                np.tile([row_bits(s.k, b, first.group, first.shared) for b in widths], (s.n, 1))
                for s in program.sites
            ]
        )
        cost = self._pinned(program, cost, widths)
        cost, budget = self._affordable(program, cost, bits, widths, first.shared)
        groups = None
        if self.unit == "layer":
            groups = np.repeat(np.arange(len(program.sites)), [s.n for s in program.sites])
        return solve_knapsack(cost, bits, budget, groups=groups, seconds=SOLVER_EFFORT).choice

    def _affordable(
        self, program: Program, cost: np.ndarray, bits: np.ndarray,
        widths: tuple[int, ...], shared: bool,
    ) -> tuple[np.ndarray, int]:  # fmt: skip
        """Costs of the widths whose shared codebooks fit, and the bits left for rows.

        Where the tables of all widths leave too little, the widest go first, pinned ones excepted.
        """
        pinned = {int(pin.rpartition("=")[2]) for pin in self.pins}
        total = int(self.budget * sum(site.weights for site in program.sites))
        least = total + UNREACHABLE
        for count in range(len(widths), -1 if pinned else 0, -1):
            used = {*widths[:count], *pinned}
            open_ = np.array([width in used for width in widths])
            allowed = np.where(open_, cost, np.inf)
            budget = self.row_budget(program.sites, tuple(sorted(used)), shared)
            low = int(np.where(np.isfinite(allowed), bits, UNREACHABLE).min(1).sum())
            if low <= budget:
                return allowed, budget
            least = min(least, low + total - budget)
        most = int(bits.max(1).sum()) + total - self.row_budget(program.sites, widths, shared)
        raise BudgetError(self._unreachable(program, least, most))

    def row_budget(self, sites: tuple[Site, ...], widths: tuple[int, ...], shared: bool) -> int:
        """Bits left for rows: the budget less what sites store beside rows, and LoRA if counted."""
        total = int(self.budget * sum(site.weights for site in sites))
        beside = sum(site_bits(site.n, widths, shared) for site in sites)
        lora = sum(16 * self.adapter_rank * (site.n + site.k) for site in sites)
        return total - beside - lora

    def _unreachable(self, program: Program, least: int, most: int) -> str:
        weights = sum(site.weights for site in program.sites)
        pins = f" with pins {', '.join(self.pins)}" if self.pins else ""
        low, high = (np.ceil(1000 * bits / weights) / 1000 for bits in (least, most))
        return (
            f"bit_budget={self.budget:g} is out of reach{pins}: this model can be stored in "
            f"{low:.3f} to {high:.3f} bits per weight"
        )

    def _pinned(self, program: Program, cost: np.ndarray, widths: tuple[int, ...]) -> np.ndarray:
        if not self.pins:
            return cost
        original, cost = cost, cost.copy()
        names = [site.name for site in program.sites]
        bounds = np.cumsum([0, *(site.n for site in program.sites)])
        for pin in reversed(self.pins):  # the first that matches has the last word
            pattern, _, width = pin.rpartition("=")
            select(names, [pattern], "pins")
            if width not in map(str, widths):
                raise RecipeError(f"pin {pin!r}: the width must be one of {widths}")
            column = widths.index(int(width))
            others = [i for i in range(len(widths)) if i != column]
            for index, name in enumerate(names):
                if matches(name, pattern):
                    rows = slice(bounds[index], bounds[index + 1])
                    cost[rows] = original[rows]
                    cost[rows, others] = np.inf
        return cost
