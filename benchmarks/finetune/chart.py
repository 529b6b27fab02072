"""Perplexity after the same training, by what the base stores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.figures import INK, draw_figure

NAME = "finetune_quality"
TOP = 250.0
BITS = (1.0, 4.75)
COLOURS = {
    "default": "#c2185b", "default all": "#ad1457", "default tuned": "#7b1fa2",
    "default tuned all": "#4a148c", "default plain": "#e57aa3", "default plain all": "#d05a8c",
    "default plain tuned all": "#a98bd0", "lowra": "#e08a00", "nf4": "#1f77b4", "loftq": "#2ca02c",
}  # fmt: skip

Point = tuple[float, float]


def family_of(base: str) -> str:
    """`default 2 all` is one of `default all`, `loftq-2` of `loftq`."""
    kind, *more = base.split(" ")
    return " ".join([kind.partition("-")[0], *more[1:]])


def series(rows: Mapping[str, Mapping[str, Any]], steps: int) -> dict[str, list[Point]]:
    """(stored bits, perplexity of WikiText) by family, with AdamW; a mean over seeds."""
    found: dict[str, dict[str, list[Point]]] = {}
    for row in rows.values():
        kind = (row.get("task", "wikitext"), row["optimizer"], row["steps"])
        if kind == ("wikitext", "adamw", steps):
            one = found.setdefault(family_of(row["base"]), {}).setdefault(row["base"], [])
            one.append((row["stored_bits"], row["perplexity"]))
    return {
        family: sorted((mean(b for b, _ in p), mean(v for _, v in p)) for p in bases.values())
        for family, bases in found.items()
    }


def draw(data: Mapping[str, Any], folder: Path) -> list[str]:
    """Write finetune_quality.png and .svg, a panel per number of steps; gives lines that say what
    came of it. A perplexity beyond the scale sits on its upper edge as an open triangle."""
    rows = data["rows"]
    asked = sorted({row["steps"] for row in rows.values()})
    steps = [count for count in asked if series(rows, count)]
    if not steps:
        return ["no chart: no row was trained with adamw"]

    def fill(figure: Any, axes: list[Any]) -> None:
        for axis, count in zip(axes, steps, strict=True):
            _panel(axis, series(rows, count), count)
        figure.tight_layout()

    return draw_figure(NAME, folder, (6.5 * len(steps), 5.2), len(steps), fill)


def _panel(axis: Any, found: dict[str, list[Point]], steps: int) -> None:
    for _, best in found.pop("original", []):
        axis.axhline(best, color=INK, linewidth=1, linestyle=":", label=f"original {best:.2f}")
    for family, points in sorted(found.items()):
        axis.plot(
            [bits for bits, _ in points], [min(value, TOP) for _, value in points], label=family,
            color=COLOURS.get(family, "#6c757d"), marker="D" if "default" in family else "o",
        )  # fmt: skip
        for bits, value in points:
            if value > TOP:
                axis.plot([bits], [TOP], marker="^", markersize=11, fillstyle="none",
                          color=COLOURS.get(family, "#6c757d"))  # fmt: skip
    axis.set(
        xlim=BITS, ylim=(14, TOP * 1.1), yscale="log", title=f"{steps} steps",
        xlabel="stored bits per compressed weight", ylabel="perplexity after training",
    )  # fmt: skip
    axis.legend(frameon=False)
