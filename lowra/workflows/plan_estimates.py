"""What a compile would take and lose, estimated from shapes alone and labelled as estimates.

Seconds and memory come from one measured compile (benchmarks/compile, its result is committed as
benchmarks/results/compile.json): each stage's seconds are divided by what drives it, and scale with
that. Memory is a sum of the tensors that a stage holds at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.passes import RotateInputs
from lowra.recipe import Recipe

MEASURED = (
    "scaled from one compile of SmolLM2-135M at 2 bits on 2 cores (Intel Xeon, 2026-11-22, "
    "torch 2.13, benchmarks/results/compile.json)"
)
GAUSSIAN = "rows taken as Gaussian after rotation, without data or error feedback"
BASE_BYTES = 500_000_000
"""Resident size of Python with torch and transformers."""

SENSITIVITY_TOKENS = 2048

GAUSSIAN_ERROR = {1: 0.363, 1.6: 0.190, 2: 0.1175, 3: 0.0345, 4: 0.0095, 8: 4.2e-5}
"""Relative squared error of the best scalar codebook for a normal distribution (Lloyd-Max)."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a stage per unit of its driver (a key of `_drivers`)."""

    driver: str
    seconds: float


COSTS = {
    "capture": Cost("sites", 11.3 / 210),
    "calibration": Cost("weight-tokens", 36.7 / (1.0617e8 * 16384)),
    "collect-statistics": Cost("weight-tokens", 14.7 / (1.0617e8 * 16384)),
    "measure-sensitivity": Cost("weight-gradients", 6.84 / (1.0617e8 * SENSITIVITY_TOKENS)),
    "rotate-inputs": Cost("weight-columns", 8.6 / 8.664e10),  # decision 11, 17 CPU seconds
    "fit-codebooks": Cost("weight-widths", 11.64 / (1.0617e8 * 4)),
    "assign-precision": Cost("rows", 1.24 / 155520),
    "compare-uniform": Cost("weight-columns", 25.0 / 8.664e10),
    "quantize-weights": Cost("weight-columns", 34.5 / 8.664e10),
    "initialize-adapters": Cost("weight-columns", 9.55 / 8.664e10),
    "rewrite-linears": Cost("sites", 0.089 / 210),
}
"""Measured seconds over the driver's value in that compile."""

GROWING = "the drivers leave caches and thread counts out; expect a factor of 2 either way"


def stage_estimates(program: Program, recipe: Recipe, kept_bytes: int) -> dict[str, Any]:
    """Seconds and peak bytes of each stage of `recipe`, and how they were obtained."""
    drivers = _drivers(program, recipe)
    names = [step.name for step in recipe.passes() if not _at_once(step)]
    steps = ["capture", *([] if recipe.data_free else ["calibration"]), *names]
    if recipe.data_free:
        steps = [name for name in steps if name != "collect-statistics"]
    memory = _memory(program, recipe, kept_bytes)
    stages = [
        {
            "name": name,
            "seconds": drivers[COSTS[name].driver] * COSTS[name].seconds,
            "peak_bytes": memory.get(name, memory["capture"]),
        }
        for name in steps
        if name in COSTS
    ]
    return {
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages),
        "peak_bytes": max(stage["peak_bytes"] for stage in stages),
        "obtained": f"{MEASURED}; {GROWING}",
    }


def _at_once(step: Pass) -> bool:
    """A pass that has nothing to measure, other than in the compile that the costs are from."""
    return isinstance(step, RotateInputs) and step.rule != "measured"


def _drivers(program: Program, recipe: Recipe) -> dict[str, float]:
    weights = sum(site.weights for site in program.sites)
    return {
        "sites": len(program.sites),
        "rows": sum(site.n for site in program.sites),
        "weight-tokens": weights * recipe.calibration_tokens,
        "weight-gradients": weights
        * (
            recipe.calibration_tokens
            if recipe.guided
            else min(recipe.calibration_tokens, SENSITIVITY_TOKENS)
        ),
        "weight-widths": weights * len(recipe.candidate_widths) * len(recipe.candidate_layouts),
        "weight-columns": sum(site.n * site.k**2 for site in program.sites),
    }


def _memory(program: Program, recipe: Recipe, kept_bytes: int) -> dict[str, int]:
    """Peak bytes of each stage: the dense model, and what the stage holds beside it.

    Gram matrices are counted once per site and module below the same parent and width, as sites
    that share an input do; nearly all of them are in memory together (docs/architecture.md).
    """
    dense = sum(site.weights * site.dtype.itemsize for site in program.sites)
    model = BASE_BYTES + dense + kept_bytes
    inputs = {(site.name.rpartition(".")[0], site.k): site.k for site in program.sites}
    power = 1 if recipe.statistics == "diagonal" else 2
    grams = 4 * sum(k**power for k in inputs.values())
    largest = max(site.weights for site in program.sites)
    widest = max(site.k for site in program.sites)
    packed = int(recipe.bit_budget * sum(site.weights for site in program.sites) / 8)
    widths = len(recipe.candidate_widths)
    square = 4 * widest**2
    return {
        "capture": model,
        "collect-statistics": model + (0 if recipe.data_free else grams),
        "fit-codebooks": model + 4 * largest * (2 + widths) + 4 * square,
        "quantize-weights": model + packed + 4 * largest * 10 + 4 * square,
        "initialize-adapters": model + packed + 8 * largest * 4 + 8 * square,
        "rewrite-linears": model + packed,
    }


def expected_error(uniform_bits: Mapping[float, float], budget: float) -> dict[str, Any]:
    """The relative output error of Gaussian rows at `budget` bits per weight.

    uniform_bits: stored bits per weight with every row at a width. Between two widths, rows are
    mixed, so the error lies on the lower convex hull of (bits, error).
    """
    points = sorted((bits, GAUSSIAN_ERROR[width]) for width, bits in uniform_bits.items())
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and not _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    error = hull[0][1] if budget <= hull[0][0] else hull[-1][1]
    for (low, high_error), (high, low_error) in zip(hull, hull[1:], strict=False):
        if low <= budget <= high:
            share = (budget - low) / (high - low)
            error = high_error + share * (low_error - high_error)
    return {"relative_error": error, "obtained": GAUSSIAN}


def _turns_up(
    first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]
) -> bool:
    """True where `middle` lies below the line from `first` to `last`."""
    rise = (last[1] - first[1]) * (middle[0] - first[0])
    return (middle[1] - first[1]) * (last[0] - first[0]) < rise
