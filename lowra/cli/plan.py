"""lowra plan: what a compile would do, before any long work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from lowra.cli.options import (
    BitsOption,
    CountAdaptersOption,
    Dtype,
    DtypeOption,
    IgnoreOption,
    IncludeOption,
    JsonOption,
    ModelArgument,
    PinOption,
    Preset,
    PresetOption,
    RankOption,
    Unit,
    UnitOption,
    VerboseOption,
    WidthsOption,
    make_recipe,
)
from lowra.cli.sources import load_source
from lowra.cli.tables import bytes_text, group_alike, print_facts, print_skipped, print_table
from lowra.cli.tables import shape_text as shape

if TYPE_CHECKING:
    from rich.console import Console

    from lowra.workflows.planning import Plan


def plan_model(
    ctx: typer.Context,
    model: ModelArgument,
    bits: BitsOption,
    preset: PresetOption = Preset.default,
    rank: RankOption = None,
    widths: WidthsOption = None,
    unit: UnitOption = Unit.row,
    pin: PinOption = None,
    include: IncludeOption = None,
    ignore: IgnoreOption = None,
    count_adapters: CountAdaptersOption = False,
    dtype: DtypeOption = Dtype.bfloat16,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what compiling would do: sites, sizes, the reachable interval, what is skipped."""
    import lowra.api
    from lowra.compiler.progress import show_progress

    recipe = make_recipe(
        bit_budget=bits, preset=preset, rank=rank, widths=widths, unit=unit, pin=pin,
        include=include, ignore=ignore, count_adapters=count_adapters,
    )  # fmt: skip
    with show_progress():
        dense, _ = load_source(model, dtype)
        plan = lowra.api.plan(dense, recipe)
    data = {"model": model, "recipe": recipe.to_dict(), **plan.to_dict()}
    ctx.obj.show(data, lambda console: _render(console, plan))


def _render(console: Console, plan: Plan) -> None:
    rows = [
        (name, shape(site["shape"]), f"{count * site['shape'][0] * site['shape'][1]:,}")
        for name, site, count in group_alike(plan.sites, "shape")
    ]
    print_table(console, "to compress", ("site", "shape>", "weights>"), rows)
    print_skipped(console, plan.skipped)
    print_facts(console, _facts(plan))


def _facts(plan: Plan) -> dict[str, str]:
    reachable = f"{plan.lowest_bits:.3f} to {plan.highest_bits:.3f} {plan.counts} per weight"
    return {
        "sites": f"{len(plan.sites)}, {plan.weights:,} weights",
        "budget": f"{plan.bit_budget:g} {plan.counts} per weight",
        "reachable": reachable,
        "dense": bytes_text(plan.dense_bytes),
        "compressed": f"at most {bytes_text(plan.largest_bytes)}",
        "adapter": f"{bytes_text(plan.adapter_bytes)} beside it",
        "pipeline": plan.pipeline,
    }
