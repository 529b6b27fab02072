"""The rows as a chart: KL and perplexity over stored bits, one line per method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

from benchmarks.figures import INK, PAPER, draw_figure
from benchmarks.quality.ours import PRESETS, TUNED
from benchmarks.quality.peers import PEERS
from benchmarks.quality.rows import ORIGINAL, Row, missing_by_reason

BITS = (1.0, 4.75)
ADAPTER = "+adapter"
PANELS = (
    ("kl", "KL from the original (nats per token)", 12.0),
    ("perplexity", "perplexity, WikiText-2 test", 3000.0),
)
OURS = {
    "default": "#c2185b",
    "default+tune": "#7b1fa2",
    "lowra": "#e08a00",
    "lowra+tune": "#8d6e00",
}
_COLOURS = ("#1f77b4", "#2ca02c", "#17a2b8", "#6c757d", "#8c564b", "#3f51b5", "#708238", "#009688")

Point = tuple[float, float]


def draw(rows: Iterable[Row], missing: Mapping[str, str], folder: Path) -> list[str]:
    """Write quality.png and quality.svg into `folder`; gives lines that say what came of it."""
    rows = list(rows)

    def fill(figure: Any, axes: list[Any]) -> None:
        for axis, (field, label, top) in zip(axes, PANELS, strict=True):
            _panel(axis, rows, field, label, top)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False)
        note = [line for why in missing_by_reason(missing) for line in wrap(f"Missing: {why}", 200)]
        figure.text(0.01, 0.005, "\n".join(note), fontsize=7, va="bottom")
        figure.tight_layout(rect=(0, 0.02 * len(note), 1, 0.87))

    return draw_figure("quality", folder, (13, 6.2), 2, fill)


def lines(rows: Iterable[Row], field: str) -> dict[str, list[Point]]:
    """(stored bits, value) of every measured row by method, left to right.

    A method with an adapter of its own has a second line, of the base with it, at the bits of both.
    """
    found: dict[str, list[Point]] = {}
    for row in rows:
        if row["method"] == ORIGINAL or row.get(field) is None:
            continue
        found.setdefault(row["method"], []).append((row["stored_bits"], row[field]))
        adapted = row.get(f"{field}_with_adapter")
        if adapted is not None and row["method"] in PEERS:
            bits = row["stored_bits"] + row["adapter_bits"]
            found.setdefault(row["method"] + ADAPTER, []).append((bits, adapted))
    return {method: sorted(points) for method, points in found.items()}


def best_per_size(points: Iterable[Point]) -> list[Point]:
    """Of points whose bits agree to a hundredth, the lowest: what a method's line runs through."""
    best: dict[float, Point] = {}
    for bits, value in points:
        size = round(bits, 2)
        if size not in best or value < best[size][1]:
            best[size] = (bits, value)
    return [best[size] for size in sorted(best)]


def title_of(method: str) -> str:
    """What the legend and the table call `method`."""
    base = method.removesuffix(TUNED)
    if base in PRESETS:
        return f"lowra, preset {base}" + (", tuned" if base != method else "")
    peer = method.removesuffix(ADAPTER)
    return PEERS[peer].title + (" with its adapter" if peer != method else "")


def _panel(axis: Any, rows: list[Row], field: str, label: str, top: float) -> None:
    series = lines(rows, field)
    original = next((row for row in rows if row["method"] == ORIGINAL), None)
    colours = dict(zip(PEERS, _COLOURS, strict=False))
    for method in sorted(series, key=lambda m: (m.partition("+")[0] not in PRESETS, m)):
        ours = method in OURS
        _line(
            axis, series[method], top, label=title_of(method),
            color=OURS[method] if ours else colours[method.removesuffix(ADAPTER)],
            linewidth=2.8 if ours else 1.2, markersize=7 if ours else 4.5,
            zorder=4 if ours else 2, linestyle="--" if method.endswith(ADAPTER) else "-",
            marker="D" if method.startswith("default") else "s" if ours else "o",
        )  # fmt: skip
    if original is not None and field == "perplexity":
        axis.axhline(original[field], color=INK, linewidth=1, linestyle=":")
        axis.annotate(f"original {original[field]:.2f}", (BITS[0] + 0.05, original[field]),
                      xytext=(0, -11), textcoords="offset points", fontsize=8)  # fmt: skip
    values = [v for points in series.values() for _, v in points if v > 0 and math.isfinite(v)]
    floor = original[field] if original is not None and field == "perplexity" else None
    low = 0.8 * min([*values, *([floor] if floor else [])], default=top / 10)
    axis.set(xlim=BITS, ylim=(low, top * 1.15), yscale="log", ylabel=label, facecolor=PAPER,
             xlabel="stored bits per compressed weight")  # fmt: skip


def _line(axis: Any, points: list[Point], top: float, **style: Any) -> None:
    """All points, a line through the best of each size; a value beyond `top` sits on it as ^."""
    marker, label = style.pop("marker"), style.pop("label")
    best = best_per_size(points)
    axis.plot(*zip(*((b, min(v, top)) for b, v in best), strict=True), marker="", **style)
    inside = [point for point in points if point[1] <= top]
    above = [(bits, top) for bits, value in points if not value <= top]
    dots = {**style, "linestyle": ""}
    if inside:
        axis.plot(*zip(*inside, strict=True), marker=marker, **dots)
    if above:
        axis.plot(*zip(*above, strict=True), marker="^", fillstyle="none", **dots)
    axis.plot([], [], marker=marker, label=label, **style)
