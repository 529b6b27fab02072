"""choose-layouts: how each site stores scales and codebooks, in competition with row widths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from lowra.compiler.facts import Codebooks, LayoutFits
from lowra.compiler.layout import Layout
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.spill import StoredTensor
from lowra.passes.assign_precision import AssignPrecision
from lowra.passes.budget.frontier import Frontier, frontier, price_of_bits, ranked
from lowra.passes.budget.relaxation import Floats
from lowra.passes.rounding.stored_books import in_layouts

Plan = tuple[int, ...]
"""Per unit, the index of its layout."""

LOOKS = 12
"""Most promising plans, which are planned to the end where their bound does not rule them out."""


@dataclass(frozen=True)
class ChooseLayouts(Pass):
    """Give each site one of the layouts that fit-codebooks fitted, and the codebooks of it.

    A layout that stores more (scales per group, a codebook per row) leaves rows fewer bits, so both
    are priced together: the Lagrangian relaxation of layouts and widths
    (lowra.passes.budget.frontier), with the stored bits of assign-precision. Its most promising
    answers, and each layout for all sites, are planned as assign-precision will do it, unless their
    dual bound rules them out; the one of least expected loss stays. So no single layout for all
    sites loses less within the budget, and where the bound rules out all that were not looked at,
    nothing else does.

    The options are those of assign-precision; pins, counted adapters and corrections hold. With
    unit "siblings", sites that share a width share a layout too. Expected losses are those of
    single rows under error feedback (fit-codebooks), not of the refined codes.
    """

    name: ClassVar[str] = "choose-layouts"
    reads: ClassVar = (Codebooks, LayoutFits)
    writes: ClassVar = (Codebooks, Layout)
    budget: float = 2.0
    unit: str = "row"
    pins: tuple[str, ...] = ()
    adapter_rank: int = 0
    correction_rank: int = 0
    correction_bits: int = 4

    def run(self, program: Program) -> Program:
        step = AssignPrecision(
            budget=self.budget, unit=self.unit, pins=self.pins, adapter_rank=self.adapter_rank,
            correction_rank=self.correction_rank, correction_bits=self.correction_bits,
        )  # fmt: skip
        with stage("layouts", None):
            options = _Options(program, step)
            return options.placed(self._best(options, step))

    def _best(self, options: _Options, step: AssignPrecision) -> Plan:
        """The plan of least expected loss among those looked at; out of reach, the smallest one."""
        best, least = None, math.inf
        for bound, plan in itertools.chain(
            itertools.islice(options.ranked(), LOOKS), options.uniform()
        ):
            if bound >= least or not options.fits(plan):
                continue
            loss = step.least_loss(options.placed(plan))
            if loss < least:
                best, least = plan, loss
        return best or options.smallest()


class _Options:
    """What every unit loses and stores in every layout."""

    def __init__(self, program: Program, step: AssignPrecision) -> None:
        self.program, self.step = program, step
        fits = [program.fact(site.name, LayoutFits) for site in program.sites]
        self.layouts, self.widths = tuple(fits[0].files), fits[0].widths
        groups = step.site_groups(program)
        self.units = groups or [(site,) for site in program.sites]
        self.budget = step.whole_budget(program.sites)
        self.costs = [self._costs(fits, layout) for layout in self.layouts]
        self.frontiers = lru_cache(self._frontiers)

    def _costs(self, fits: Sequence[LayoutFits], layout: Layout) -> dict[str, Floats]:
        """Expected losses [n, widths] of each site in a layout, inf where a pin forbids."""
        sites = self.program.sites
        losses = [StoredTensor(fit.files[layout], "loss").load().numpy() for fit in fits]
        cost = self.step.pinned_cost(self.program, np.concatenate(losses), self.widths)
        parts = np.split(cost, np.cumsum([site.n for site in sites])[:-1])
        return {site.name: part for site, part in zip(sites, parts, strict=True)}

    def _frontiers(self, stored: tuple[float, ...]) -> list[list[Frontier]]:
        """Of each unit, one frontier per layout, where sites hold tables of the widths `stored`."""
        places = range(len(self.layouts))
        return [[self._frontier(unit, place, stored) for place in places] for unit in self.units]

    def _frontier(self, unit: Sequence[Site], place: int, stored: tuple[float, ...]) -> Frontier:
        layout = self.layouts[place]
        open_ = np.array([width in stored for width in self.widths])
        cost = np.concatenate([self.costs[place][site.name] for site in unit])
        cost = np.where(open_, cost, np.inf)
        rows = [[layout.row_bits(site.k, width) for width in self.widths] for site in unit]
        bits = np.repeat(np.array(rows, dtype=np.int64), [site.n for site in unit], axis=0)
        if self.step.unit != "row":
            cost, bits = cost.sum(0, keepdims=True), bits.sum(0, keepdims=True)
        beside = sum(layout.site_bits(site.n, site.k, stored) for site in unit)
        return frontier(cost, bits, beside)

    def ranked(self) -> Iterator[tuple[float, Plan]]:
        """Plans and their bounds, the most promising first."""
        for units in self._open_frontiers():
            if priced := price_of_bits(units, self.budget):
                yield from ranked(units, priced)
                return

    def uniform(self) -> Iterator[tuple[float, Plan]]:
        """Each layout for all sites that fits the budget, and its bound."""
        for place in range(len(self.layouts)):
            for units in self._open_frontiers():
                alone = [[unit[place]] for unit in units]
                if priced := price_of_bits(alone, self.budget):
                    yield priced.bound, (place,) * len(self.units)
                    break

    def fits(self, plan: Plan) -> bool:
        """True where the narrowest rows of a plan fit the budget."""
        return any(
            sum(int(unit[place].bits[0]) for unit, place in zip(units, plan, strict=True))
            <= self.budget
            for units in self._open_frontiers()
        )

    def smallest(self) -> Plan:
        """Per unit the layout of fewest bits."""
        *_, units = self._open_frontiers()
        return tuple(
            min(range(len(unit)), key=lambda place: int(unit[place].bits[0])) for unit in units
        )

    def _open_frontiers(self) -> Iterator[list[list[Frontier]]]:
        return (self.frontiers(stored) for stored in self.step.open_widths(self.widths))

    def placed(self, plan: Plan) -> Program:
        """The program in the layouts of a plan."""
        return in_layouts(
            self.program,
            {site.name: self.layouts[place]
             for unit, place in zip(self.units, plan, strict=True) for site in unit},
        )  # fmt: skip
