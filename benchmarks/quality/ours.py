"""lowra under the protocol: a preset at a budget of stored bits, adapters off."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

import lowra
from benchmarks.quality.protocol import Task, sites_of
from benchmarks.quality.rows import Row
from lowra.runtime.module_view import quantized_linears

PRESETS = ("default", "lowra")
BUDGETS = (4.25, 3.25, 2.75, 2.25, 2.0, 1.75, 1.5, 1.25)
TUNED = "+tune"


def settings_of(preset: str, bits: float, tune: bool) -> dict[str, Any]:
    return {"preset": preset, "bit_budget": bits, **({"tune": "full"} if tune else {})}


def tuning_missing() -> str | None:
    """Why tuned rows cannot be made, or None."""
    if "tune" in {field.name for field in dataclasses.fields(lowra.Recipe)}:
        return None
    return f"lowra {lowra.__version__} has no tuning stage: Recipe takes no tune="


def measure(task: Task, settings: Mapping[str, Any]) -> Row:
    """One row. The paper's preset counts code bits: its budget is lowered to the stored bits."""
    preset, bits = settings["preset"], settings["bit_budget"]
    budget = bits if preset == "default" else paper_code_bits(task.model, bits)
    if budget is None:
        return {"unreachable": f"what the paper stores beside its codes leaves none at {bits:g}"}
    calibrated = preset == "default" or settings.get("tune")
    windows, context = task.calibration.shape
    options = {"tune": settings["tune"]} if "tune" in settings else {}
    if preset == "default":  # adapters are off, and its base does not depend on them
        options["rank"] = 0
    compressed = lowra.compile(
        task.model, bit_budget=budget, preset=preset, context=context,
        calibration=task.calibration if calibrated else None,
        calibration_tokens=windows * context, work_dir=task.work_dir, **options,
    )  # fmt: skip
    report = compressed.lowra.report
    if settings.get("tune"):  # norms were tuned with the weights
        base = task.score(compressed)
    else:
        base = task.score_weights({n: m.weight for n, m in quantized_linears(compressed).items()})
    row: Row = {
        "stored_bits": report["totals"]["stored_bits"], "perplexity": base.perplexity,
        "kl": base.kl, "code_bits": report["totals"]["code_bits"],
        "rows": report["totals"]["rows"], "assignment": report["assignment"],
        "stage_seconds": report["seconds"],
    }  # fmt: skip
    if settings.get("tune"):
        row["tuning"] = report["tuning"]["kl"]
    if preset == "lowra":  # its base stands for the weight together with its adapter only
        adapted = task.score(compressed)
        row |= {"perplexity_with_adapter": adapted.perplexity, "kl_with_adapter": adapted.kl,
                "adapter_bits": report["totals"]["adapter_bits"]}  # fmt: skip
    return row


def paper_code_bits(model: nn.Module, stored: float) -> float | None:
    """The largest code budget whose stored bits surely fit, or None where none does.

    What the paper stores beside codes (absmax scales, tables, width tags) grows with the widths;
    tables grow convexly with the width, so a mix of the narrowest and the widest bounds them.
    """
    best = None
    for hundredths in range(100, 401):
        budget = hundredths / 100
        if worst_stored_bits(model, budget) <= stored:
            best = budget
    return best


def worst_stored_bits(model: nn.Module, code_bits: float) -> float:
    recipe = lowra.Recipe(bit_budget=code_bits, preset="lowra")
    layout = recipe.layout
    widths = recipe.candidate_widths
    total = weights = 0.0
    for site in sites_of(model).values():
        n, k = site.weight.shape
        beside = [layout.row_bits(k, b) - b * k for b in widths]
        slope = (beside[-1] - beside[0]) / (widths[-1] - widths[0])
        total += n * (k * code_bits + beside[0] + slope * (code_bits - widths[0]))
        weights += n * k
    return total / weights
