"""lowra plan: what a compile would do, before any long work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    OverwriteOption,
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
from lowra.cli.sources import load_shapes
from lowra.cli.tables import (
    bytes_text,
    group_alike,
    print_facts,
    print_skipped,
    print_table,
    seconds_text,
)
from lowra.cli.tables import shape_text as shape

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

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
    out: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.json", help="Write the plan, for lowra compile --plan."),
    ] = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what compiling would do: sites, sizes, the reachable interval, what is skipped.

    Only shapes are read (config.json, or the header of a .gguf file), so a model of any size is
    planned in seconds. Times, memory and error are estimates.
    """
    import lowra.api
    from lowra.compiler.progress import show_progress
    from lowra.workflows.plan_file import write_plan

    recipe = make_recipe(
        bit_budget=bits, preset=preset, rank=rank, widths=widths, unit=unit, pin=pin,
        include=include, ignore=ignore, count_adapters=count_adapters,
    )  # fmt: skip
    with show_progress():
        plan = lowra.api.plan(load_shapes(model, dtype), recipe)
    data = {"model": model, **plan.to_dict()}
    if out is not None:
        data["written"] = str(write_plan(plan.to_dict(), out, overwrite))
    ctx.obj.show(data, lambda console: _render(console, plan))


def _render(console: Console, plan: Plan) -> None:
    rows = [
        (name, shape(site["shape"]), f"{count * site['shape'][0] * site['shape'][1]:,}")
        for name, site, count in group_alike(plan.sites, "shape")
    ]
    print_table(console, "to compress", ("site", "shape>", "weights>"), rows)
    print_skipped(console, plan.skipped)
    print_facts(console, _facts(plan))
    if plan.estimates is not None:
        _render_estimates(console, plan.estimates)


def _render_estimates(console: Console, found: Mapping[str, Any]) -> None:
    rows = [
        (stage["name"], seconds_text(stage["seconds"]), bytes_text(stage["peak_bytes"]))
        for stage in found["stages"]
    ]
    rows.append(("all", seconds_text(found["seconds"]), bytes_text(found["peak_bytes"])))
    print_table(console, "time and memory, estimated", ("stage", "time>", "peak memory>"), rows)
    error = found["error"]
    print_facts(
        console,
        {
            "estimated error": f"{error['relative_error']:.3g} of a layer's output energy",
            "": error["obtained"],
            "estimated time": found["obtained"],
        },
    )


def _facts(plan: Plan) -> dict[str, str]:
    counted = plan.recipe["count_adapters"]
    beside = "at most, within the budget" if counted else "beside it"
    reachable = f"{plan.lowest_bits:.3f} to {plan.highest_bits:.3f} {plan.counts} per weight"
    return {
        "sites": f"{len(plan.sites)}, {plan.weights:,} weights",
        "budget": f"{plan.bit_budget:g} {plan.counts} per weight",
        "reachable": reachable,
        "dense": bytes_text(plan.dense_bytes),
        "compressed": f"at most {bytes_text(plan.largest_bytes)}",
        "adapter": f"{bytes_text(plan.adapter_bytes)} {beside}",
        "checkpoint": f"at most {bytes_text(plan.file_bytes)}, with all that stays as it is",
        "pipeline": plan.pipeline,
    }
