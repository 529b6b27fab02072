"""The report of a fine-tuning run: JSON data, and the loss curve as an SVG that needs nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from lowra.runtime.training import Trainable

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 400, 64, 40, 16, 48
TRAIN, HELD_OUT, INK = "#8aa4c8", "#c0392b", "#333333"
Point = tuple[float, float]


def make_report(
    state: Any, settings: dict[str, Any], data: dict[str, Any], counts: Trainable
) -> dict[str, Any]:
    """Plain JSON data: settings, data, what trained, both curves, and the best evaluation.

    `curve` has one entry per log (loss, rate, norm of the gradient, tokens per second, peak
    memory), `evaluations` one per evaluation, step 0 before training. A number beyond a float is
    None: JSON has no infinity.
    """
    history = state.log_history
    curve = [_step(entry) for entry in history if "loss" in entry]
    evaluations = [
        {"step": entry["step"], "loss": entry["eval_loss"], "perplexity": _exp(entry["eval_loss"])}
        for entry in history
        if "eval_loss" in entry
    ]
    best = min(evaluations[1:] or evaluations, key=lambda e: e["loss"], default=None)
    return {
        "steps": state.global_step,
        "planned_steps": state.max_steps,
        "stopped_early": state.global_step < state.max_steps,
        "epochs": state.epoch,
        "trainable": {
            **dataclasses.asdict(counts), "trained": counts.trained,
        },
        "before": evaluations[0] if evaluations and evaluations[0]["step"] == 0 else None,
        "best": best,
        "peak_bytes": max((entry["peak_bytes"] for entry in curve), default=0),
        "curve": curve,
        "evaluations": evaluations,
        "data": data,
        "settings": settings,
    }  # fmt: skip


def _step(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": entry["step"], "loss": entry["loss"], "rate": entry.get("learning_rate"),
        "gradient_norm": _finite(entry.get("grad_norm")),
        "tokens_per_second": entry.get("tokens_per_second"),
        "peak_bytes": entry.get("peak_bytes", 0),
    }  # fmt: skip


def _exp(value: float) -> float | None:
    return math.exp(value) if value < 700 else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def write_report(report: dict[str, Any], data: Path, picture: Path) -> None:
    """Write the report and its curve, each whole or not at all."""
    train = [(entry["step"], entry["loss"]) for entry in report["curve"]]
    held_out = [(entry["step"], entry["loss"]) for entry in report["evaluations"]]
    for path, text in (
        (data, json.dumps(report, indent=1) + "\n"), (picture, loss_curve(train, held_out)),
    ):  # fmt: skip
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text)
        partial.replace(path)


def loss_curve(train: list[Point], held_out: list[Point]) -> str:
    """An SVG of two curves, (step, loss) each; losses that are no numbers are left out."""
    curves = [[p for p in points if math.isfinite(p[1])] for points in (train, held_out)]
    every = [*curves[0], *curves[1]] or [(0.0, 0.0)]
    low, high = min(y for _, y in every), max(y for _, y in every)
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)
    last = max(1.0, max(x for x, _ in every))

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - point[1]) / (high - low)

    parts = [_grid(low + (high - low) * i / 4, place) for i in range(5)]
    parts += [_tick(last * i / 4, place, low) for i in range(5)]
    for points, colour in zip(curves, (TRAIN, HELD_OUT), strict=True):
        parts.append(_line([place(point) for point in points], colour))
    parts += [_label(LEFT, "training loss", TRAIN), _label(LEFT + 110, "held-out loss", HELD_OUT)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _grid(loss: float, place: Any) -> str:
    y = place((0.0, loss))[1]
    return (
        f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.3f}</text>'
    )


def _tick(step: float, place: Any, low: float) -> str:
    x = place((step, low))[0]
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step:.0f}</text>'


def _line(points: list[Point], colour: str) -> str:
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'
                   for x, y in points if len(points) <= 60)  # fmt: skip
    return f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.8"/>{dots}'


def _label(x: int, text: str, colour: str) -> str:
    return f'<text x="{x}" y="{TOP - 16}" fill="{colour}">{text}</text>'
