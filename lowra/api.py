"""compile, plan, save, load, export, adapters: the only file that sees every room."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lowra.compiler.capture import capture
from lowra.compiler.errors import CaptureError, RecipeError
from lowra.compiler.offload import Offload, offload, work_device
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.progress import record_stages, stage
from lowra.compiler.spill import Spill
from lowra.passes import NormalizeLinears, QuantizeWeights
from lowra.recipe import Recipe
from lowra.runtime.adapters import load_adapter, save_adapter
from lowra.runtime.checkpoint_reader import load_checkpoint
from lowra.runtime.checkpoint_writer import save_checkpoint
from lowra.runtime.compiled import Compiled, compiled
from lowra.runtime.dense_view import build_dense_view
from lowra.runtime.export import export_program
from lowra.runtime.module_view import build_module_view
from lowra.runtime.training import attach
from lowra.workflows.calibration_batches import calibrated
from lowra.workflows.models import load_model
from lowra.workflows.placement import on_cpu, put_like
from lowra.workflows.plan_file import check_plan, has_widths, read_plan, with_planned
from lowra.workflows.planning import Plan, check_budget, kept_bytes, make_plan
from lowra.workflows.report import make_report
from lowra.workflows.skeletons import load_skeleton

__all__ = [
    "compile", "export", "load", "load_adapter", "merge_adapter", "plan", "save", "save_adapter",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


def compile(
    model: M,
    recipe: Recipe | None = None,
    *,
    plan: Mapping[str, Any] | str | Path | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    example: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    work_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> M:
    """Compress a model's linears and return a model of the same class; `model` is left as it was.

    Compiling works on the CPU: a model on another device is copied there, writes its own
    calibration text where it is, and the result is put beside it. With `device="cuda"` the heavy
    part of the work goes to a GPU and comes back, wherever the model lies; results differ from
    those of a CPU as sums in another order do.

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
    place = work_device(device)
    begun = time.perf_counter()
    work = on_cpu(model)
    with record_stages() as stages, torch.no_grad():
        program = _captured(work, recipe, example)
        check_budget(program, recipe)
        replay = planned is not None and has_widths(planned)
        if planned is not None:
            check_plan(program, planned)
            program = with_planned(program, planned) if replay else program
        else:
            _refuse_siblings(program, recipe)
        program = _with_data(program, model, recipe, calibration, tokenizer, work_dir)
        program = run_pipeline(program, recipe.passes(replay)[1:], heavy=_heavy(place, program))
        view = put_like(build_module_view(work, program), model)
    report = make_report(program, stages, time.perf_counter() - begun)
    # The statistics are not needed any more: a temporary spill folder goes with this object.
    program = replace(program, calibration=(), held_out=(), spill=Spill.closed(), source=None)
    plan_data = make_plan(program, recipe, kept_bytes(work, program)).to_dict()
    info = Compiled(
        program.sites, program.fingerprint, recipe.to_dict(), plan_data, report, program
    )
    attach(view, info)
    return cast("M", view)


def plan(
    model: nn.Module | str | Path,
    recipe: Recipe | None = None,
    *,
    measure: bool = False,
    calibration: Any = None,
    tokenizer: Any = None,
    example: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
    work_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Plan:
    """What compiling would do: sites, what is skipped and why, the reachable interval, sizes,
    and estimates of error, seconds and memory.

    Touches nothing and reads no calibration data. Of a model given by name (a folder, a `.gguf`
    file, a Hub id) only shapes are read, from its config; nothing is traced then. Raises as
    `compile` does for a bad recipe.

    `measure` loads the weights and runs the passes of a compile that choose widths: the plan then
    holds the width of every row and the loss that they are expected to cost, and a compile replays
    it. `calibration`, `tokenizer`, `work_dir` and `device` are as in `compile`, and need `measure`;
    a compile with the same `work_dir` takes statistics and codebooks from it. Raises what `compile`
    raises.
    """
    recipe = _recipe(recipe, options)
    given = {
        "calibration": calibration, "tokenizer": tokenizer, "work_dir": work_dir, "device": device,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and not measure:
            raise RecipeError(f"{name} is read where a plan is measured: add measure=True")
    if isinstance(model, (str, Path)):
        model, found = load_model(model) if measure else (load_skeleton(model), None)
        tokenizer = found if tokenizer is None else tokenizer
    _require_dense(model)
    if measure:
        return _measured_plan(model, recipe, example, calibration, tokenizer, work_dir, device)
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


def export(
    model: nn.Module, path: str | Path, *, overwrite: bool = False,
    example: Mapping[str, Tensor] | tuple[Tensor, ...] | None = None,
) -> Path:  # fmt: skip
    """Write the compressed graph as a torch.export archive; it runs without transformers.

    `example` as in `compile`, for a model that was loaded and is no text model of transformers.
    """
    return export_program(model, path, overwrite=overwrite, example=example)


def merge_adapter(
    model: M, *, dense: bool = False, calibration: Any = None, tokenizer: Any = None,
    work_dir: str | Path | None = None,
) -> M:  # fmt: skip
    """A model without an adapter that stands for `model` with the one it has; `model` stays.

    The dense weights W + s B A of every site are compiled anew with the model's own recipe at rank
    0: they do not lie on its codebooks, so this loses again what quantizing loses, and mostly more
    than the adapter is worth below 3 bits. `lowra.workflows.merge_cost` measures it. With `dense`
    they stay dense, and nothing is lost but rounding to the model's dtype.
    `calibration`, `tokenizer` and `work_dir` as in `compile`.

    Raises AdapterError for a model without an adapter, and for a plain module, which cannot be
    built anew; what `compile` raises.
    """
    merged = build_dense_view(model)
    if dense:
        return merged
    info = compiled(model)
    assert info is not None
    recipe = Recipe.from_dict({**info.recipe, "rank": 0})
    return compile(merged, recipe, calibration=calibration, tokenizer=tokenizer, work_dir=work_dir)


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


def _measured_plan(
    model: nn.Module, recipe: Recipe, example: Mapping[str, Tensor] | tuple[Tensor, ...] | None,
    calibration: Any, tokenizer: Any, work_dir: str | Path | None,
    device: str | torch.device | None,
) -> Plan:  # fmt: skip
    """The plan after the passes of a compile that choose widths."""
    _require_weights(model)
    place = work_device(device)
    begun = time.perf_counter()
    work = on_cpu(model)
    with record_stages() as stages, torch.no_grad():
        program = _captured(work, recipe, example)
        check_budget(program, recipe)
        _refuse_siblings(program, recipe)
        program = _with_data(program, model, recipe, calibration, tokenizer, work_dir)
        passes = recipe.passes()[1:]
        for step in passes:
            step.require(program)  # also of those that only a compile runs
        chosen = tuple(takewhile(_chooses, passes))
        program = run_pipeline(program, chosen, heavy=_heavy(place, program))
    seconds = {**stages, "total": time.perf_counter() - begun}
    return make_plan(program, recipe, kept_bytes(work, program), seconds)


def _heavy(place: torch.device | None, program: Program) -> Offload | None:
    """Where a compile's heavy work is done; None for the CPU."""
    return None if place is None else offload(place, list(program.tensors.values()))


def _refuse_siblings(program: Program, recipe: Recipe) -> None:
    """Raise RecipeError for unit="siblings" where there is no graph to ask, before long work."""
    if recipe.unit == "siblings":
        recipe.assignment().site_groups(program)


def _chooses(step: Pass) -> bool:
    """True for the passes in front of the first that quantizes."""
    return not isinstance(step, QuantizeWeights)


def _with_data(
    program: Program, model: nn.Module, recipe: Recipe, calibration: Any, tokenizer: Any,
    work_dir: str | Path | None,
) -> Program:  # fmt: skip
    """The program with calibration batches and a work folder."""
    with stage("calibration", None):
        program = calibrated(program, model, recipe, calibration, tokenizer)
    return replace(program, spill=Spill(None if work_dir is None else Path(work_dir)))
