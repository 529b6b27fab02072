"""The shares that are kept by stored bits, and the spectra of the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.figures import INK, draw_figure

COLOURS = {
    "lowra": "#c2185b", "LoRAQuant": "#e08a00", "RTN": "#1f77b4", "GPTQ": "#2ca02c",
    "BIN": "#6c757d", "PB-LLM": "#17a2b8", "BiLLM": "#8c564b", "JD-Diagonal": "#3f51b5",
}  # fmt: skip
LOWEST = -0.25
BITS = (1.0, 5.0)


def points(rows: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """By family of methods, (stored bits, share) of each of its methods, a mean over adapters."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for done in rows.values():
        for method, row in done.items():
            family = method.split(" ")[0]
            if family in COLOURS and "share" in row:
                one = found.setdefault(family, {}).setdefault(method, [])
                one.append((row["bits"], row["share"]))
    return {
        family: sorted((mean(b for b, _ in p), mean(s for _, s in p)) for p in methods.values())
        for family, methods in found.items()
    }


def draw(data: Mapping[str, Any], folder: Path) -> list[str]:
    """Write adapters_gain.png and .svg into `folder`; gives lines that say what came of it."""

    def fill(figure: Any, axes: list[Any]) -> None:
        left, right = axes
        for family, line in points(data["rows"]).items():
            ours = family == "lowra"
            shown = [(bits, max(share, LOWEST)) for bits, share in line]
            left.plot(
                *zip(*shown, strict=True), marker="D" if ours else "o", label=family,
                linestyle="-" if ours else ":", linewidth=2.6 if ours else 1.0,
                color=COLOURS[family], zorder=4 if ours else 2,
            )  # fmt: skip
        left.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        left.set(xlim=BITS, ylim=(LOWEST - 0.05, 1.1), xlabel="stored bits per adapter parameter",
                 ylabel="share of the gain that is kept")  # fmt: skip
        left.legend(frameon=False, loc="lower right")
        for where, values in data["spectra"].items():
            right.plot(range(1, len(values) + 1), values, marker=".", label=where)
        right.set(yscale="log", xlabel="direction", ylabel="share of sigma^2, mean over layers")
        right.legend(frameon=False, fontsize=7)
        figure.tight_layout()

    return draw_figure("adapters_gain", folder, (13, 5.4), 2, fill)
