"""The GPU's measured products under its roof: what they reach by operations per byte.

    python -m benchmarks.speed.roofline

Draws benchmarks/results/speed_gpu_roofline.png and .svg from speed_gpu.json. The roof is what
torch's own bfloat16 product reached in those rows: bytes per second at one token, operations per
second at the best.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import INK, draw_figure
from benchmarks.results_file import FOLDER

NAME = "speed_gpu_roofline"
SHAPE = (8192, 8192)
COLOURS = {
    "4 bits": "#8d6e00", "3 bits": "#e08a00", "2 bits": "#c2185b", "1 bit": "#7b1fa2",
    "torch bfloat16": "#1f77b4",
}  # fmt: skip

Point = tuple[float, float]


def series(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """(operations per byte, operations per second) of each kind of weight, by tokens."""
    found: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row["m"]):
        n, k, m = row["n"], row["k"], row["m"]
        if (n, k) != SHAPE:
            continue
        operations, beside = 2 * m * n * k, 2 * m * (n + k)
        weight = {row["case"]: (row["bytes"], row["lowra_us"])}
        if row["case"] == "2 bits":
            weight["torch bfloat16"] = (2 * n * k, row["dense_us"])
        for name, (size, us) in weight.items():
            found.setdefault(name, []).append((operations / (size + beside), operations / us * 1e6))
    return found


def roof(rows: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The most bytes per second (one token) and operations per second of torch's products."""
    sizes = [(r["n"], r["k"], r["m"], r["dense_us"] / 1e6) for r in rows]
    read = max((2 * n * k + 2 * (n + k)) / s for n, k, m, s in sizes if m == 1)
    return read, max(2 * m * n * k / s for n, k, m, s in sizes)


def draw(data: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the chart; gives lines that say what came of it."""
    read, compute = roof(data["rows"])

    def fill(figure: Any, axes: list[Any]) -> None:
        (axis,) = axes
        ends = [0.5, compute / read, 1e4]
        axis.plot(ends, [min(compute, read * x) / 1e12 for x in ends], color=INK, linewidth=1,
                  label=f"roof: {read / 1e12:.2f} TB/s, {compute / 1e12:.0f} TFLOP/s")  # fmt: skip
        for name, points in series(data["rows"]).items():
            dense = name not in ("4 bits", "3 bits", "2 bits", "1 bit")
            axis.plot(
                [x for x, _ in points], [y / 1e12 for _, y in points], label=name,
                color=COLOURS[name], marker="o" if dense else "D", markersize=5,
                linestyle=":" if dense else "-",
            )  # fmt: skip
        axis.set(
            xscale="log", yscale="log", xlabel="operations per byte read or written",
            ylabel="TFLOP/s", title=f"{data['gpu']}, 8192 x 8192, 1 to 4096 tokens",
        )  # fmt: skip
        axis.legend(frameon=False, loc="lower right")
        figure.tight_layout()

    return draw_figure(NAME, folder, (8.5, 5.6), 1, fill)


def main() -> None:
    print(*draw(json.loads((FOLDER / "speed_gpu.json").read_text()), FOLDER), sep="\n")


if __name__ == "__main__":
    main()
