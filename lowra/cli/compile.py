"""lowra compile: a model in, a checkpoint folder out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.advanced import (
    ADVANCED,
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
    CountAdaptersOption,
    Dtype,
    DtypeOption,
    IgnoreOption,
    IncludeOption,
    JsonOption,
    ModelArgument,
    OptionalBitsOption,
    OverwriteOption,
    PinOption,
    Preset,
    PresetOption,
    RankOption,
    Tune,
    TuneOption,
    TuneStepsOption,
    Unit,
    UnitOption,
    VerboseOption,
    WidthsOption,
    make_recipe,
    refuse_options,
)
from lowra.cli.sources import load_source, require_tokenizer
from lowra.cli.tables import print_facts, print_seconds, print_skipped, totals_of
from lowra.cli.work_folder import work_folder

if TYPE_CHECKING:
    from rich.console import Console

    from lowra.runtime.compiled import Compiled


RECIPE_OPTIONS = (
    "bits", "preset", "rank", "widths", "unit", "pin", "include", "ignore", "count_adapters",
    "calibration_tokens", "context", "seed",
    "tune", "tune_steps", *ADVANCED,
)  # fmt: skip


def compile_model(
    ctx: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint folder to write.")],
    bits: OptionalBitsOption = None,
    preset: PresetOption = Preset.default,
    rank: RankOption = None,
    widths: WidthsOption = None,
    unit: UnitOption = Unit.row,
    pin: PinOption = None,
    include: IncludeOption = None,
    ignore: IgnoreOption = None,
    count_adapters: CountAdaptersOption = False,
    tune: TuneOption = Tune.none,
    tune_steps: TuneStepsOption = None,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = None,
    context: ContextOption = None,
    seed: SeedOption = 0,
    work_dir: Annotated[
        Path | None,
        typer.Option(help="Keep statistics and finished layers here; by default in OUT.work."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.json", help="Replay a plan, in place of recipe options."),
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.json", help="Write the plan, with the widths of all rows."),
    ] = None,
    dtype: DtypeOption = Dtype.bfloat16,
    device: WorkDeviceOption = None,
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
    """Compress MODEL to a bit budget and write it, with its tokenizer, as a checkpoint folder.

    Finished work is kept beside OUT: interrupted, the same command goes on where it was.
    """
    from lowra.compiler.offload import work_device
    from lowra.compiler.progress import show_progress
    from lowra.workflows.plan_file import check_plan_path, read_plan, write_plan

    work_device(device)  # refuses one that is not there
    if plan is not None:
        refuse_options(ctx, RECIPE_OPTIONS, "--plan, which holds the recipe")
        what: dict[str, Any] = {"plan": read_plan(plan)}
    elif bits is None:
        raise typer.BadParameter("give a budget, or a --plan", param_hint="'--bits'")
    else:
        what = {"recipe": make_recipe(
            bit_budget=bits, preset=preset, rank=rank, widths=widths, unit=unit, pin=pin,
            include=include, ignore=ignore, count_adapters=count_adapters,
            calibration_tokens=calibration_tokens, context=context, seed=seed,
            tune=tune.value, tune_steps=tune_steps, **advanced_fields(ctx),
        )}  # fmt: skip
    check_output(out, overwrite)
    if save_plan is not None:
        check_plan_path(save_plan, overwrite)
    with work_folder(out, work_dir, ctx.obj.note) as folder, show_progress():
        ctx.obj.resumable = True
        what |= {"device": device, "work_dir": folder}
        info = _compile(model, dtype, what, calibration, out, overwrite)
    data = {"model": model, "path": str(out), "recipe": dict(info.recipe), **info.report}
    if save_plan is not None:
        data["plan"] = str(write_plan(info.plan, save_plan, overwrite))
    ctx.obj.show(data, lambda console: _render(console, data))


def _compile(
    source: str, dtype: Dtype, what: dict[str, Any], calibration: Path | None, out: Path,
    overwrite: bool,
) -> Compiled:  # fmt: skip
    """Load, compress (`what`: recipe or plan, and where) and save; what the model carries."""
    import lowra.api
    from lowra.compiler.progress import stage
    from lowra.runtime.compiled import compiled

    dense, tokenizer = load_source(source, dtype)
    if calibration is not None:
        require_tokenizer(tokenizer, source)
    model = lowra.api.compile(dense, **what, calibration=calibration, tokenizer=tokenizer)
    with stage(f"save {out}", None):
        lowra.api.save(model, out, tokenizer=tokenizer, overwrite=overwrite)
    info = compiled(model)
    assert info is not None
    return info


def check_output(out: Path, overwrite: bool) -> None:
    """Raise OutputError unless `out` is free, or an earlier checkpoint that may be replaced."""
    from lowra.compiler.errors import OutputError
    from lowra.runtime.checkpoint_writer import check_free
    from lowra.runtime.manifest import MANIFEST

    check_free(out, overwrite)
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise OutputError(f"{out} is no lowra checkpoint and is not overwritten; choose another")


def _render(console: Console, data: dict[str, Any]) -> None:
    print_skipped(console, data["skipped"])
    print_facts(console, totals_of(data))
    print_seconds(console, data)
    console.print(f"wrote {data['path']}", soft_wrap=True)
