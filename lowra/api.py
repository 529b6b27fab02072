"""compile, plan, save, load, export: the only file that sees every room."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lowra.compiler.capture import capture
from lowra.compiler.errors import CalibrationError, CaptureError, RecipeError
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.progress import record_stages, stage
from lowra.compiler.spill import Spill
from lowra.passes import NormalizeLinears
from lowra.recipe import Recipe
from lowra.runtime.checkpoint import load_checkpoint, save_checkpoint
from lowra.runtime.compiled import ATTRIBUTE, Compiled, compiled
from lowra.runtime.export import export_program
from lowra.runtime.module_view import build_module_view
from lowra.workflows.calibration import as_token_batches, generate_calibration
from lowra.workflows.models import vocabulary_size
from lowra.workflows.plan_file import check_plan, has_widths, read_plan, with_planned
from lowra.workflows.planning import Plan, check_budget, kept_bytes, make_plan
from lowra.workflows.report import make_report
from lowra.workflows.skeletons import load_skeleton

M = TypeVar("M", bound=nn.Module)
BATCH_TOKENS = 4096
HELD_OUT_TOKENS = 1024
"""Calibration tokens that no pass learns from: what a plan is compared with uniform widths on."""
HOLD_OUT_ONE_IN = 8
"""Of fewer windows than this, none is held out."""
log = logging.getLogger("lowra")


def compile(
    model: M,
    recipe: Recipe | None = None,
    *,
    plan: Mapping[str, Any] | str | Path | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    example: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    work_dir: str | Path | None = None,
    **options: Any,
) -> M:
    """Compress a model's linears and return a model of the same class; `model` is left as it was.

    Parameters: `recipe`, or its fields as keywords (`bit_budget=1.5`); `calibration`, texts, a
    .txt path or token ids int64 [windows, length] (for a model that takes no tokens: tuples of its
    input tensors), by default text that the model writes itself, seeded, or none where it cannot;
    `tokenizer` for texts; `example` inputs to trace a plain module with; `work_dir` keeps
    statistics and finished layers, so that a second compile, or one after a crash, reuses them.
    `plan` replays a plan (a file, or `other.lowra.plan`) in place of a recipe: the same options,
    and the same widths and ranks where a compile made the plan.

    Raises RecipeError, PlanError, BudgetError, PatternError, WeightError, CalibrationError,
    CaptureError, OutputError: all before or instead of a result, none with anything half done.
    """
    planned = None if plan is None else _planned(plan, recipe, options)
    recipe = _recipe(recipe, options) if planned is None else Recipe.from_dict(planned["recipe"])
    _require_dense(model)
    _require_weights(model)
    begun = time.perf_counter()
    with record_stages() as stages, torch.no_grad():
        program = _captured(model, recipe, example)
        check_budget(program, recipe)
        replay = planned is not None and has_widths(planned)
        if planned is not None:
            check_plan(program, planned)
            program = with_planned(program, planned) if replay else program
        elif recipe.unit == "siblings":
            recipe.assignment().site_groups(program)  # refuses a program without a graph
        with stage("calibration", None):
            program = _calibrated(program, model, recipe, calibration, tokenizer)
        program = replace(program, spill=Spill(None if work_dir is None else Path(work_dir)))
        program = run_pipeline(program, recipe.passes(replay)[1:])
        view = build_module_view(model, program)
    report = make_report(program, stages, time.perf_counter() - begun)
    # The statistics are not needed any more: a temporary spill folder goes with this object.
    program = replace(program, calibration=(), held_out=(), spill=Spill.closed(), source=None)
    plan_data = make_plan(program, recipe, kept_bytes(model, program)).to_dict()
    info = Compiled(
        program.sites, program.fingerprint, recipe.to_dict(), plan_data, report, program
    )
    setattr(view, ATTRIBUTE, info)
    return cast("M", view)


def plan(
    model: nn.Module | str | Path,
    recipe: Recipe | None = None,
    *,
    example: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    **options: Any,
) -> Plan:
    """What compiling would do: sites, what is skipped and why, the reachable interval, sizes,
    and estimates of error, seconds and memory.

    Touches nothing and reads no calibration data. Of a model given by name (a folder, a `.gguf`
    file, a Hub id) only shapes are read, from its config; nothing is traced then. Raises as
    `compile` does for a bad recipe.
    """
    recipe = _recipe(recipe, options)
    if isinstance(model, (str, Path)):
        model = load_skeleton(model)
    _require_dense(model)
    with torch.no_grad():
        program = _captured(model, recipe, example)
    check_budget(program, recipe)
    return make_plan(program, recipe, kept_bytes(model, program))


def save(
    model: nn.Module, path: str | Path, *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write a compiled model as a checkpoint folder (docs/storage-format.md); see `load`."""
    return save_checkpoint(model, path, tokenizer=tokenizer, overwrite=overwrite)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The compiled model in a checkpoint folder; `model` is a dense skeleton for plain modules."""
    return load_checkpoint(path, model)


def export(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the compressed graph as a torch.export archive; it runs without transformers."""
    return export_program(model, path, overwrite=overwrite)


def _require_dense(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"a {type(model).__name__} is no torch module; pass a loaded model")
    if compiled(model) is not None:
        raise RecipeError("this model is compiled already; compile the dense model instead")


def _require_weights(model: nn.Module) -> None:
    empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise CaptureError(
            f"{empty} is on the meta device and holds no values: load the weights to compile; "
            "lowra.plan works without them"
        )


def _recipe(recipe: Recipe | None, options: Mapping[str, Any]) -> Recipe:
    if recipe is None:
        return Recipe.from_dict(options)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe is a {type(recipe).__name__}; pass lowra.Recipe(...)")
    if options:
        return Recipe.from_dict(recipe.to_dict() | dict(options))
    return recipe


def _planned(
    plan: Mapping[str, Any] | str | Path, recipe: Recipe | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The plan to replay. Raises RecipeError for options that contradict it."""
    given = [*(["recipe"] if recipe is not None else []), *options]
    if given:
        raise RecipeError(f"a plan holds its recipe: leave {', '.join(given)} out, or the plan")
    return read_plan(plan)


def _captured(
    model: nn.Module, recipe: Recipe, example: Mapping[str, Tensor] | tuple[Tensor, ...] | None
) -> Program:
    with stage("capture", None):
        program = capture(model, example)
    normalize = recipe.passes()[0]
    assert isinstance(normalize, NormalizeLinears)
    return run_pipeline(program, [normalize])


def _calibrated(
    program: Program, model: nn.Module, recipe: Recipe, calibration: Any, tokenizer: Any
) -> Program:
    """The program with its calibration batches; without any where it runs data-free."""
    if recipe.data_free:
        if calibration is not None:
            raise CalibrationError("preset 'lowra' is data-free: leave calibration out")
        return program
    if "input_ids" not in program.inputs:
        return replace(program, calibration=_plain_batches(program, calibration))
    if calibration is None:
        try:
            ids = generate_calibration(
                model, tokens=recipe.calibration_tokens + _extra(recipe), context=recipe.context,
                seed=recipe.seed,
            )  # fmt: skip
        except CalibrationError as error:
            log.warning("compiling data-free: %s", error)
            return program
    else:
        ids = as_token_batches(
            calibration, tokenizer, vocabulary_size(model) or 0,
            tokens=recipe.calibration_tokens, context=recipe.context,
        )  # fmt: skip
    count = min(len(ids) // HOLD_OUT_ONE_IN, max(1, HELD_OUT_TOKENS // ids.shape[1]))
    learned, held_out = ids[: len(ids) - count], ids[len(ids) - count :]
    return replace(
        program,
        calibration=_token_batches(program, learned),
        held_out=_token_batches(program, held_out) if count else (),
    )


def _extra(recipe: Recipe) -> int:
    """Tokens to write for holding out, where there is enough text to hold some out."""
    plenty = recipe.calibration_tokens >= HOLD_OUT_ONE_IN * HELD_OUT_TOKENS
    return HELD_OUT_TOKENS if plenty else 0


def _token_batches(program: Program, ids: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    batches = ids.split(max(1, BATCH_TOKENS // ids.shape[1]))
    return tuple(_token_batch(program, batch) for batch in batches)


def _token_batch(program: Program, ids: Tensor) -> tuple[Tensor, ...]:
    values = {"attention_mask": torch.ones_like(ids)}
    return tuple(values.get(name, ids) for name in program.inputs)


def _plain_batches(program: Program, calibration: Any) -> tuple[tuple[Tensor, ...], ...]:
    """Calibration of a model without token inputs: tuples of input tensors, or bare tensors."""
    if calibration is None:
        return (program.example,) if program.example else ()
    if isinstance(calibration, (str, Path)):
        raise CalibrationError("this model takes no tokens: calibrate with tuples of input tensors")
    if not isinstance(calibration, (Tensor, Iterable)):
        raise CalibrationError(f"calibration is a {type(calibration).__name__}, not tensors")
    items = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    batches = [(item,) if isinstance(item, Tensor) else tuple(item) for item in items]
    if not batches:
        raise CalibrationError("calibration is empty; give at least one batch of input tensors")
    for batch in batches:
        if not all(isinstance(tensor, Tensor) and tensor.numel() for tensor in batch):
            raise CalibrationError("each calibration batch must be non-empty tensors, in order")
        if program.inputs and len(batch) != len(program.inputs):
            raise CalibrationError(
                f"a calibration batch has {len(batch)} tensors; the model takes "
                f"{len(program.inputs)}: {', '.join(program.inputs)}"
            )
        for got, like in zip(batch, program.example, strict=False):
            if got.dtype != like.dtype or got.shape[-1] != like.shape[-1]:
                raise CalibrationError(
                    f"a calibration tensor is {got.dtype} {list(got.shape)}; the model was traced "
                    f"with {like.dtype} {list(like.shape)}, whose last axis must agree"
                )
    return tuple(batches)
