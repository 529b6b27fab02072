"""One way to draw: the same bytes for the same data, as .png and .svg."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

INK, PAPER, GRID = "#222222", "#ffffff", "#dddddd"
STYLE = {
    "svg.hashsalt": "lowra", "svg.fonttype": "path", "text.color": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def draw_figure(
    name: str, folder: Path, size: tuple[float, float], columns: int,
    fill: Callable[[Any, list[Any]], None],
) -> list[str]:  # fmt: skip
    """Write `name`.png and .svg into `folder`: panels side by side, which `fill(figure, axes)`
    draws into. Gives lines that say what came of it."""
    try:
        import matplotlib
    except ImportError:
        return ["no chart: matplotlib is not installed (pip install '.[bench]')"]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, columns, figsize=size, facecolor=PAPER, squeeze=False)
        fill(figure, list(axes[0]))
        for axis in axes[0]:
            axis.grid(which="major", color=GRID, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        folder.mkdir(parents=True, exist_ok=True)
        png, svg = (folder / f"{name}.{kind}" for kind in ("png", "svg"))
        figure.savefig(png, dpi=130, facecolor=PAPER, metadata={"Software": None})
        figure.savefig(svg, facecolor=PAPER, metadata={"Date": None})
        pyplot.close(figure)
    return [f"wrote {png.name}", f"wrote {svg.name}"]
