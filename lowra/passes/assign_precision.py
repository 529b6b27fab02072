"""assign-precision: a width per row (or per site) under a hard budget of stored bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from lowra.compiler.correction import correction_bits
from lowra.compiler.dataflow import siblings
from lowra.compiler.errors import BudgetError, RecipeError
from lowra.compiler.facts import AdapterRank, Assigned, Codebooks, Precision, Proof
from lowra.compiler.layout import Layout
from lowra.compiler.packing import TERNARY
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site, select
from lowra.compiler.progress import stage
from lowra.passes.budget.pins import Pin, bill_of_pins, parse_pins, pinned_widths
from lowra.passes.budget.relaxation import Assignment, Floats, Ints, Rows

UNREACHABLE = 1 << 40
"""Bits of a row no budget can pay for."""

SOLVER_EFFORT = 0.1
"""Deterministic CP-SAT seconds for the undecided band; the bound is proven whatever it is."""


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Choose widths that minimise the summed expected loss under the budget.

    budget: bits per weight over all sites. rule "default": one multiple-choice knapsack over all
    rows with true stored bits (codes, padding, scales, codebooks, width tags), each in the layout
    of its site's codebooks, solved to a proven gap. rule "paper": the two-level program of LowRA
    (ICML 2025, section 6) on code bits alone.
    unit: what shares a width: "row", "layer" (a site) or "siblings" (all sites that read one
    input, so that a fused kernel sees one width). pins: "pattern=width" entries fix the width of
    matching sites; of several, the first wins. adapter_rank: also charge 16-bit LoRA factors of
    that rank to the budget. ranks: choose a rank per site among them, against the same bits.
    correction_rank, correction_bits: charge the exact bits of such a correction per site
    (correct-weights).
    Raises BudgetError with the reachable interval, PatternError for a pin that matches nothing,
    RecipeError for siblings in a program without a graph, or pinned apart.
    """

    name: ClassVar[str] = "assign-precision"
    reads: ClassVar = (Codebooks,)
    writes: ClassVar = (Precision, Assigned)
    budget: float = 2.0
    rule: str = "default"
    unit: str = "row"
    pins: tuple[str, ...] = ()
    adapter_rank: int = 0
    ranks: tuple[int, ...] = ()
    correction_rank: int = 0
    correction_bits: int = 4

    def run(self, program: Program) -> Program:
        widths = program.fact(program.sites[0].name, Codebooks).widths
        cost = _cost(program)
        with stage("precision", None):
            if self.rule == "paper":
                budget = int(self.budget * sum(site.weights for site in program.sites))
                plan, ranks = self._paper(program, cost, widths), None
            else:
                plan, budget, ranks = self._knapsack(program, widths)
        return _with_plan(program, cost, widths, plan, budget, ranks)

    def least_loss(self, program: Program) -> float:
        """The expected loss of the plan that `run` makes; it may also raise what that raises."""
        widths = program.fact(program.sites[0].name, Codebooks).widths
        return self._knapsack(program, widths)[0].cost

    def _paper(self, program: Program, cost: Floats, widths: tuple[float, ...]) -> Assignment:
        counted = self.adapter_rank or self.ranks or self.correction_rank
        if self.pins or self.unit != "row" or counted:
            raise RecipeError("rule=paper knows no pins, layers or adapters; use rule=default")
        if TERNARY in widths:
            raise RecipeError(
                "rule=paper counts whole bits and knows no width 1.6; use rule=default"
            )
        from lowra.passes.budget.solver import solve_two_level

        sizes = np.concatenate([np.full(site.n, site.k) for site in program.sites])
        return solve_two_level(cost, sizes, tuple(map(int, widths)), self.budget)

    def _knapsack(
        self, program: Program, widths: tuple[float, ...]
    ) -> tuple[Assignment, int, tuple[int, ...] | None]:
        from lowra.passes.budget.solver import solve_knapsack

        layouts = {site.name: program.fact(site.name, Codebooks).layout for site in program.sites}
        bits, groups = _bits_of_rows(program.sites, layouts, widths), self._groups(program)
        cost, budget = self._affordable(
            program, self.pinned_cost(program, _cost(program), widths), bits, widths, layouts
        )
        if self.ranks:
            from lowra.passes.budget.rank_options import solve_with_ranks

            plan, chosen = solve_with_ranks(
                program, Rows(cost, bits, groups), budget, self.ranks, SOLVER_EFFORT
            )
            return plan, budget, chosen
        plan = solve_knapsack(cost, bits, budget, groups=groups, seconds=SOLVER_EFFORT)
        return plan, budget, None

    def _groups(self, program: Program) -> Ints | None:
        """The group of each row whose rows must agree; None where each row is free."""
        if self.unit == "row":
            return None
        sites = program.sites
        number = {site.name: index for index, site in enumerate(sites)}
        for group in self.site_groups(program):
            number |= {site.name: number[group[0].name] for site in group}
        return np.repeat([number[site.name] for site in sites], [site.n for site in sites])

    def site_groups(self, program: Program) -> list[tuple[Site, ...]]:
        """Sites that must agree on a width. Raises RecipeError where there is no graph to ask."""
        if self.unit != "siblings":
            return []
        if program.graph is None:
            raise RecipeError(
                "unit='siblings' needs the model's graph, to see which sites share an input, and "
                f"there is none ({program.warning}); use unit='layer' or unit='row'"
            )
        return siblings(program)

    def _affordable(
        self, program: Program, cost: Floats, bits: Ints, widths: tuple[float, ...],
        layouts: Mapping[str, Layout],
    ) -> tuple[Floats, int]:  # fmt: skip
        """Costs of the widths whose shared codebooks fit, and the bits left for rows."""
        total = int(self.budget * sum(site.weights for site in program.sites))
        least = total + UNREACHABLE
        for stored in self.open_widths(widths):
            open_ = np.array([width in stored for width in widths])
            allowed = np.where(open_, cost, np.inf)
            budget = self.row_budget(program.sites, stored, layouts)
            low = int(np.where(np.isfinite(allowed), bits, UNREACHABLE).min(1).sum())
            if low <= budget:
                return allowed, budget
            least = min(least, low + total - budget)
        most = int(bits.max(1).sum()) + total - self.row_budget(program.sites, widths, layouts)
        raise BudgetError(self._unreachable(program, widths, least, most))

    def open_widths(self, widths: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
        """Widths whose shared tables every site holds: all, then without the widest, and so on.

        Where the tables of all widths leave rows too little, the widest go first, pinned ones
        excepted.
        """
        pinned = {width for _, width in parse_pins(self.pins, widths)}
        for count in range(len(widths), -1 if pinned else 0, -1):
            used = {*widths[:count], *pinned}
            yield tuple(width for width in widths if width in used)

    def row_budget(
        self, sites: tuple[Site, ...], widths: tuple[float, ...], layouts: Mapping[str, Layout]
    ) -> int:
        """Bits left for rows: the whole budget less what sites store beside rows."""
        beside = sum(layouts[site.name].site_bits(site.n, site.k, widths) for site in sites)
        return self.whole_budget(sites) - beside

    def whole_budget(self, sites: tuple[Site, ...]) -> int:
        """The budget in bits, less counted LoRA factors and corrections."""
        total = int(self.budget * sum(site.weights for site in sites))
        lora = sum(16 * self.adapter_rank * (site.n + site.k) for site in sites)
        rank, bits = self.correction_rank, self.correction_bits
        return total - lora - sum(correction_bits(site.n, site.k, rank, bits) for site in sites)

    def _unreachable(
        self, program: Program, widths: tuple[float, ...], least: int, most: int
    ) -> str:
        weights = sum(site.weights for site in program.sites)
        pins = f" with pins {', '.join(self.pins)}" if self.pins else ""
        low, high = (np.ceil(1000 * bits / weights) / 1000 for bits in (least, most))
        bill = bill_of_pins(
            program.sites,
            self._pins(program, widths),
            lambda site, width: (
                site.n * program.fact(site.name, Codebooks).layout.row_bits(site.k, width)
            ),
        )
        return (
            f"bit_budget={self.budget:g} is out of reach{pins}: this model can be stored in "
            f"{low:.3f} to {high:.3f} bits per weight{bill}"
        )

    def _pins(self, program: Program, widths: tuple[float, ...]) -> dict[str, Pin]:
        return pinned_widths(
            program.sites, self.site_groups(program), parse_pins(self.pins, widths)
        )

    def pinned_cost(self, program: Program, cost: Floats, widths: tuple[float, ...]) -> Floats:
        """The costs [rows of all sites, widths] with inf at every width that a pin excludes."""
        names = [site.name for site in program.sites]
        select(names, [pin.rpartition("=")[0] for pin in self.pins], "pins")
        cost = cost.copy()
        pinned = self._pins(program, widths)
        bounds = np.cumsum([0, *(site.n for site in program.sites)])
        for index, name in enumerate(names):
            if name in pinned:
                others = [i for i, width in enumerate(widths) if width != pinned[name][1]]
                cost[bounds[index] : bounds[index + 1], others] = np.inf
        return cost


def _cost(program: Program) -> Floats:
    """Expected losses of the rows of all sites: float64 [rows, widths]."""
    books = (program.fact(site.name, Codebooks) for site in program.sites)
    return np.concatenate([found.loss.numpy() for found in books])


def _bits_of_rows(
    sites: tuple[Site, ...], layouts: Mapping[str, Layout], widths: tuple[float, ...]
) -> Ints:
    """Stored bits of the rows of all sites, each in its site's layout: int64 [rows, widths]."""
    per_site = [[layouts[s.name].row_bits(s.k, b) for b in widths] for s in sites]
    return np.repeat(np.array(per_site, dtype=np.int64), [s.n for s in sites], axis=0)


def _with_plan(
    program: Program, cost: Floats, widths: tuple[float, ...], plan: Assignment, budget: int,
    ranks: tuple[int, ...] | None,
) -> Program:  # fmt: skip
    """The program with Precision, Assigned, and AdapterRank where ranks were chosen."""
    bound = plan.bound if ranks is None else None  # of the joint program nothing is proven
    proof = Proof(plan.cost, plan.bits, budget, bound, plan.price)
    ends = np.cumsum([site.n for site in program.sites])[:-1]
    chosen = np.split(plan.choice, ends)
    lost = np.split(cost[np.arange(len(cost)), plan.choice], ends)
    facts: dict[str, list[object]] = {}
    for site, part, loss in zip(program.sites, chosen, lost, strict=True):
        ids = np.asarray(program.fact(site.name, Codebooks).ids, dtype=np.uint8)
        precision = Precision(torch.from_numpy(ids[part]))
        facts[site.name] = [precision, Assigned(float(loss.sum()), proof)]
    for site, rank in zip(program.sites, ranks or (), strict=False):
        facts[site.name].append(AdapterRank(rank))
    return program.with_facts(facts)
