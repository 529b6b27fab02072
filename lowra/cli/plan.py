"""lowra plan: what a compile would do, before any long work."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.advanced import (
    AlphaOption,
    CodebookBitsOption,
    CorrectionBitsOption,
    CorrectionRankOption,
    GroupOption,
    GuidedOption,
    InitOption,
    LayoutsOption,
    LoraDropoutOption,
    RankPatternOption,
    RotationOption,
    RsloraOption,
    ScaleBitsOption,
    SharedCodebooksOption,
    TargetsOption,
    TrainOption,
    TrellisOption,
    advanced_fields,
)
from lowra.cli.calibration_options import (
    CalibrationOption,
    CalibrationTokensOption,
    ContextOption,
    SeedOption,
    WorkDeviceOption,
)
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
    refuse_options,
)
from lowra.cli.plan_tables import render_plan
from lowra.cli.sources import load_shapes, load_source, require_tokenizer
from lowra.cli.work_folder import work_folder

if TYPE_CHECKING:
    from lowra.recipe import Recipe
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
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Load the weights and choose the width of every row, as compile does."
        ),
    ] = False,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = None,
    context: ContextOption = None,
    seed: SeedOption = 0,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Keep statistics and codebooks here; compile finds them again."),
    ] = None,
    device: WorkDeviceOption = None,
    dtype: DtypeOption = Dtype.bfloat16,
    out: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.json", help="Write the plan, for lowra compile --plan."),
    ] = None,
    overwrite: OverwriteOption = False,
    layouts: LayoutsOption = None,
    group: GroupOption = None,
    scale_bits: ScaleBitsOption = None,
    codebook_bits: CodebookBitsOption = None,
    shared_codebooks: SharedCodebooksOption = None,
    trellis: TrellisOption = None,
    rotation: RotationOption = None,
    guided: GuidedOption = None,
    init: InitOption = None,
    correction_rank: CorrectionRankOption = None,
    correction_bits: CorrectionBitsOption = None,
    alpha: AlphaOption = None,
    targets: TargetsOption = None,
    rank_pattern: RankPatternOption = None,
    rslora: RsloraOption = None,
    lora_dropout: LoraDropoutOption = None,
    train: TrainOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what compiling would do: sites, sizes, the reachable interval, what is skipped.

    Only shapes are read (config.json, or the header of a .gguf file), so a model of any size is
    planned in seconds. Times, memory and error are estimates. With --measure the passes that choose
    widths run, and the loss is what they expect of the weights and the calibration text.
    """
    from lowra.compiler.offload import work_device
    from lowra.compiler.progress import show_progress
    from lowra.workflows.plan_file import check_plan_path, write_plan

    recipe = make_recipe(
        bit_budget=bits, preset=preset, rank=rank, widths=widths, unit=unit, pin=pin,
        include=include, ignore=ignore, count_adapters=count_adapters,
        calibration_tokens=calibration_tokens, context=context, seed=seed, **advanced_fields(ctx),
    )  # fmt: skip
    if not measure:
        what = ("calibration", "work_dir", "device")
        refuse_options(ctx, what, "a plan from shapes; add --measure")
    work_device(device)  # refuses one that is not there
    if out is not None:
        check_plan_path(out, overwrite)
    kept = nullcontext() if work_dir is None else work_folder(work_dir, work_dir, ctx.obj.note)
    with kept as folder, show_progress():
        ctx.obj.resumable = folder is not None
        where = {"calibration": calibration, "work_dir": folder, "device": device}
        plan = _plan(model, dtype, recipe, where) if measure else _sizes(model, dtype, recipe)
    data = {"model": model, **plan.to_dict()}
    if out is not None:
        data["written"] = str(write_plan(plan.file_data(), out, overwrite))
    ctx.obj.show(data, lambda console: render_plan(console, data))


def _sizes(source: str, dtype: Dtype, recipe: Recipe) -> Plan:
    import lowra.api

    return lowra.api.plan(load_shapes(source, dtype), recipe)


def _plan(source: str, dtype: Dtype, recipe: Recipe, measured: dict[str, Any]) -> Plan:
    """With the widths of all rows; `measured`: on what text, and where."""
    import lowra.api

    dense, tokenizer = load_source(source, dtype)
    if measured["calibration"] is not None:
        require_tokenizer(tokenizer, source)
    return lowra.api.plan(dense, recipe, measure=True, tokenizer=tokenizer, **measured)
