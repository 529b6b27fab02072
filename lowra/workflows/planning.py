"""plan: sizes and the reachable interval, from shapes alone, before any long work."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lowra.compiler.errors import BudgetError
from lowra.compiler.facts import Packed
from lowra.compiler.program import Program, Site, matches, select
from lowra.compiler.storage import row_bits, site_bits
from lowra.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What a compile would do, or did.

    Bits are per weight over all sites; sizes are bytes. `lowest_bits` to `highest_bits` is the
    interval that budgets can reach. `sites` and `skipped` are tables of plain data.
    """

    bit_budget: float
    counts: str
    lowest_bits: float
    highest_bits: float
    weights: int
    dense_bytes: int
    largest_bytes: int
    adapter_bytes: int
    sites: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, Any], ...]
    pipeline: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)


def make_plan(program: Program, recipe: Recipe) -> Plan:
    """The plan of a normalised program; with Packed facts, the sites carry what came out."""
    weights = sum(site.weights for site in program.sites)
    low, high = reachable(program, recipe)
    adapter = sum(2 * min(recipe.rank, s.n, s.k) * (s.n + s.k) for s in program.sites)
    return Plan(
        bit_budget=float(recipe.bit_budget),
        counts="code bits" if recipe.is_paper else "stored bits",
        lowest_bits=low,
        highest_bits=high,
        weights=weights,
        dense_bytes=sum(site.weights * site.dtype.itemsize for site in program.sites),
        largest_bytes=math.floor(min(recipe.bit_budget, high) * weights / 8),
        adapter_bytes=adapter,
        sites=tuple(_site_row(program, site) for site in program.sites),
        skipped=tuple(asdict(skipped) for skipped in program.skipped),
        pipeline=" ".join(map(str, recipe.passes())),
    )


def _site_row(program: Program, site: Site) -> dict[str, Any]:
    row: dict[str, Any] = {"name": site.name, "shape": [site.n, site.k]}
    if packed := program.find(site.name, Packed):
        widths = packed.weight.panels
        row["rows"] = {str(width): rows for width, rows in widths}
    return row


def reachable(program: Program, recipe: Recipe) -> tuple[float, float]:
    """Least (rounded up to 0.001) and most bits per weight that widths and pins allow."""
    group, shared = recipe.layout
    fixed = recipe.widths is not None or recipe.is_paper
    widths = recipe.candidate_widths
    widest = max(widths) if fixed else 8
    totals = [0.0, 0.0]
    free = any(not any(matches(s.name, p) for p in recipe.pins) for s in program.sites)
    always = {*recipe.pins.values(), *([min(widths)] if free else [])}
    for site in program.sites:
        pinned = [w for pattern, w in recipe.pins.items() if matches(site.name, pattern)]
        for end, width in enumerate(pinned[:1] * 2 or (min(widths), widest)):
            stored = tuple({width, *always})
            totals[end] += _site_total(site, width, stored, group, shared, recipe)
    weights = sum(site.weights for site in program.sites)
    low, high = (math.ceil(1000 * total / weights) / 1000 for total in totals)
    return low, high


def _site_total(
    site: Site, width: int, widths: tuple[int, ...], group: int, shared: bool, recipe: Recipe
) -> int:
    if recipe.is_paper:
        return site.weights * width
    lora = 16 * recipe.rank * (site.n + site.k) if recipe.count_adapters else 0
    beside = site_bits(site.n, widths, shared)
    return site.n * row_bits(site.k, width, group, shared) + beside + lora


def check_budget(program: Program, recipe: Recipe) -> None:
    """Raise BudgetError when the budget is below what the recipe can reach, before long work.

    Also raises PatternError for a pin that matches no site.
    """
    names = [site.name for site in program.sites]
    for pattern in recipe.pins:
        select(names, [pattern], "pins")
    low, high = reachable(program, recipe)
    if recipe.bit_budget < low:
        pins = f" with pins {dict(recipe.pins)}" if recipe.pins else ""
        raise BudgetError(
            f"bit_budget={recipe.bit_budget:g} is out of reach{pins}: this model can be stored in "
            f"{low:.3f} to {high:.3f} bits per weight"
        )
