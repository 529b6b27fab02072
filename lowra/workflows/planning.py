"""plan: sizes and the reachable interval, from shapes alone; widths and loss where measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lowra.compiler.correction import Correction, correction_bits
from lowra.compiler.dataflow import siblings
from lowra.compiler.errors import BudgetError
from lowra.compiler.facts import AdapterRank, Assigned, Packed, Precision, Statistics
from lowra.compiler.layout import Layout
from lowra.compiler.program import Program, Site, select
from lowra.compiler.rotation import Rotation
from lowra.passes.budget.pins import Pin, bill_of_pins, pinned_widths
from lowra.passes.budget.plan_bits import Counted, plan_bits
from lowra.recipe import Recipe
from lowra.workflows.plan_estimates import expected_error, stage_estimates
from lowra.workflows.plan_file import encode_widths
from lowra.workflows.report import assignment_of


@dataclass(frozen=True)
class Plan:
    """What a compile would do, or did. As a file it can be replayed (docs/guide-plans.md).

    Bits are per weight over all sites; sizes are bytes. `lowest_bits` to `highest_bits` is the
    interval that budgets can reach. `sites` and `skipped` are tables of plain data; once widths are
    chosen each site carries its rows and `row_widths`, `layout` and `rank` where these were chosen,
    and before a compile its `expected_loss`. `file_bytes`: the checkpoint, with what is not
    compressed. `estimates`: relative output error, seconds and memory per stage, from shapes alone,
    before a compile. `assignment`: expected loss and proven bound, where widths were chosen.
    `measured`: what the passes that choose them found, and their seconds, where they ran without a
    compile.
    `fingerprint` is that of the weights, or empty where only their shapes were read.
    """

    bit_budget: float
    counts: str
    lowest_bits: float
    highest_bits: float
    weights: int
    dense_bytes: int
    largest_bytes: int
    adapter_bytes: int
    file_bytes: int
    sites: tuple[dict[str, Any], ...]
    skipped: tuple[dict[str, Any], ...]
    pipeline: str
    recipe: dict[str, Any]
    fingerprint: str
    estimates: dict[str, Any] | None
    assignment: dict[str, Any] | None
    measured: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self)

    def file_data(self) -> dict[str, Any]:
        """Plain data for a plan file: without seconds, so that equal plans are equal bytes."""
        data = self.to_dict()
        if data["measured"] is not None:
            del data["measured"]["seconds"]
        return data


def make_plan(
    program: Program,
    recipe: Recipe,
    uncompressed_bytes: int = 0,
    seconds: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of a normalised program; with Packed facts, the sites carry what came out.

    uncompressed_bytes: what the model's tensors that are no sites take. seconds: of the stages that
    chose widths, where no compile follows; the program has Precision facts then.
    """
    weights = sum(site.weights for site in program.sites)
    low, high = reachable(program, recipe)
    adapter = sum(2 * _rank(program, recipe, s) * (s.n + s.k) for s in program.sites)
    largest = math.floor(min(recipe.bit_budget, high) * weights / 8)
    packed = any(program.find(site.name, Packed) for site in program.sites)
    measured = None if seconds is None else _measured(program, recipe, seconds)
    stored = measured["stored_bytes"] if measured else _packed_bytes(program)
    within = recipe.count_adapters and stored is None  # the adapter then is part of `largest`
    return Plan(
        bit_budget=float(recipe.bit_budget),
        counts="code bits" if recipe.is_paper else "stored bits",
        lowest_bits=low,
        highest_bits=high,
        weights=weights,
        dense_bytes=sum(site.weights * site.dtype.itemsize for site in program.sites),
        largest_bytes=largest,
        adapter_bytes=adapter,
        file_bytes=(largest if stored is None else stored)
        + (0 if within else adapter)
        + uncompressed_bytes,
        sites=tuple(_site_row(program, site) for site in program.sites),
        skipped=tuple(asdict(skipped) for skipped in program.skipped),
        pipeline=" ".join(map(str, recipe.passes())),
        recipe=recipe.to_dict(),
        fingerprint=program.fingerprint,
        estimates=None if packed else _estimates(program, recipe, uncompressed_bytes),
        assignment=assignment_of(program),
        measured=measured,
    )


def kept_bytes(model: nn.Module, program: Program) -> int:
    """Bytes of the model's parameters that stay as they are."""
    packed = {site.weight for site in program.sites}
    kept = (p for name, p in model.named_parameters() if name not in packed)
    return sum(p.numel() * p.element_size() for p in kept)


def _packed_bytes(program: Program) -> int | None:
    """What the weights are stored in, corrections with them; None before they are packed."""
    packed = [found.weight for s in program.sites if (found := program.find(s.name, Packed))]
    if not packed:
        return None
    beside = [found for s in program.sites if (found := program.find(s.name, Correction))]
    return sum(stored.stored_bits() for stored in (*packed, *beside)) // 8


def _measured(program: Program, recipe: Recipe, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What the passes up to the choice of widths found: the exact bits of the plan, without LoRA,
    rows per width, inputs that are rotated."""
    weights = sum(site.weights for site in program.sites)
    plan = {site.name: program.fact(site.name, Precision) for site in program.sites}
    bits = plan_bits(program, plan, Counted(0, recipe.correction_rank, recipe.correction_bits))
    ranks = {s: found.rank for s in program.sites if (found := program.find(s.name, AdapterRank))}
    bits -= sum(16 * rank * (site.n + site.k) for site, rank in ranks.items())
    rows: dict[float, int] = {}
    for precision in plan.values():
        for width, count in precision.histogram().items():
            rows[width] = rows.get(width, 0) + count
    inputs = [program.fact(group[0].name, Rotation) for group in siblings(program)]
    return {
        "stored_bits": bits / weights,
        "stored_bytes": bits // 8,
        "rows": {str(width): rows[width] for width in sorted(rows)},
        "inputs": len(inputs),
        "rotated_inputs": sum(rotation.active for rotation in inputs),
        "calibration_tokens": max(program.fact(s.name, Statistics).tokens for s in program.sites),
        "seconds": dict(seconds),
    }


def _estimates(program: Program, recipe: Recipe, uncompressed_bytes: int) -> dict[str, Any]:
    layout = recipe.layout
    uniform = {
        width: sum(site_total(s, width, (width,), layout, recipe) for s in program.sites)
        for width in recipe.candidate_widths
    }
    weights = sum(site.weights for site in program.sites)
    return {
        "error": expected_error({w: b / weights for w, b in uniform.items()}, recipe.bit_budget),
        **stage_estimates(program, recipe, uncompressed_bytes),
    }


def _rank(program: Program, recipe: Recipe, site: Site) -> int:
    """The LoRA rank of a site: the planner's where it chose one, at most what the shape has."""
    chosen = program.find(site.name, AdapterRank)
    return min(recipe.rank_of(site.name) if chosen is None else chosen.rank, site.n, site.k)


def _site_row(program: Program, site: Site) -> dict[str, Any]:
    row: dict[str, Any] = {"name": site.name, "shape": [site.n, site.k]}
    if packed := program.find(site.name, Packed):
        row["rows"] = {str(width): rows for width, rows in packed.weight.rows.items()}
    if precision := program.find(site.name, Precision):
        row["row_widths"] = encode_widths(precision.row_widths)
        row.setdefault("rows", {str(b): rows for b, rows in precision.histogram().items()})
    assigned = program.find(site.name, Assigned)
    if assigned is not None and not packed:
        row["expected_loss"] = assigned.loss
    if layout := program.find(site.name, Layout):
        row["layout"] = str(layout)
    if chosen := program.find(site.name, AdapterRank):
        row["rank"] = chosen.rank
    return row


def reachable(program: Program, recipe: Recipe) -> tuple[float, float]:
    """Least (rounded up to 0.001) and most bits per weight that widths, layouts and pins allow."""
    fixed = recipe.widths is not None or recipe.is_paper
    widths = recipe.candidate_widths
    widest = max(widths) if fixed else 8
    totals = [0.0, 0.0]
    pinned = _pinned(program, recipe)
    free = any(site.name not in pinned for site in program.sites)
    always = {*recipe.pins.values(), *([min(widths)] if free else [])}
    for unit in _units(program, recipe):
        for end, (width, extreme) in enumerate(((min(widths), min), (widest, max))):
            totals[end] += extreme(
                sum(
                    site_total(s, own, tuple({own, *always}), layout, recipe)
                    for s in unit
                    for own in [pinned[s.name][1] if s.name in pinned else width]
                )
                for layout in recipe.candidate_layouts
            )
    if recipe.rank == "auto":
        totals[1] += sum(16 * recipe.largest_rank * (s.n + s.k) for s in program.sites)
    weights = sum(site.weights for site in program.sites)
    low, high = (math.ceil(1000 * total / weights) / 1000 for total in totals)
    return low, high


def _pinned(program: Program, recipe: Recipe) -> dict[str, Pin]:
    groups = () if program.graph is None else recipe.assignment().site_groups(program)
    return pinned_widths(program.sites, groups, tuple(recipe.pins.items()))


def _units(program: Program, recipe: Recipe) -> list[tuple[Site, ...]]:
    """Sites that share a layout, as choose-layouts has them."""
    groups = [] if program.graph is None else recipe.assignment().site_groups(program)
    return groups or [(site,) for site in program.sites]


def site_total(
    site: Site, width: float, widths: tuple[float, ...], layout: Layout, recipe: Recipe
) -> int:
    """Bits of a site at one width that stores the codebooks of `widths`, LoRA if it is counted."""
    if recipe.is_paper:
        return site.weights * int(width)
    lora = 16 * recipe.fixed_rank * (site.n + site.k) if recipe.count_adapters else 0
    beside = layout.site_bits(site.n, site.k, widths)
    beside += correction_bits(site.n, site.k, recipe.correction_rank, recipe.correction_bits)
    return site.n * layout.row_bits(site.k, width) + beside + lora


def check_budget(program: Program, recipe: Recipe) -> None:
    """Raise BudgetError when the budget is below what the recipe can reach, before long work.

    Also raises PatternError for a pin that matches no site, and RecipeError for pins that
    contradict each other.
    """
    names = [site.name for site in program.sites]
    for pattern in recipe.pins:
        select(names, [pattern], "pins")
    low, high = reachable(program, recipe)
    if recipe.bit_budget >= low:
        return
    pins = f" with pins {dict(recipe.pins)}" if recipe.pins else ""
    bill = bill_of_pins(
        program.sites,
        _pinned(program, recipe),
        lambda site, width: min(
            site_total(site, width, (width,), layout, recipe) for layout in recipe.candidate_layouts
        ),
    )
    raise BudgetError(
        f"bit_budget={recipe.bit_budget:g} is out of reach{pins}: this model can be stored in "
        f"{low:.3f} to {high:.3f} bits per weight{bill}; bit_budget={low:.3f} is enough"
    )
