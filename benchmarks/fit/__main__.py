"""Speed of codebook fitting against reading the weights once from memory.

    python -m benchmarks.fit [--threads 2]

Prints a table, writes benchmarks/results/fit.json. Load the machine with nothing else.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lowra  # noqa: F401 - the ops get their kernels
from benchmarks.results_file import write_results
from lowra.passes.rounding.lloyd import fit_rows_globally, fit_shared, gaussian_levels

SHAPES = ((4096, 4096), (1536, 576))
WIDTHS = (1, 2, 3, 4)
FITS = {"one codebook, a scale per row": fit_shared, "a codebook per row": fit_rows_globally}
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    rate = read_rate()
    rows = [measured(shape, kind, rate) for shape in SHAPES for kind in FITS]
    console = Console()
    console.print(table(rows))
    console.print(f"reading memory: {rate / 1e9:.1f} GB/s, {rate / 4e6:,.0f} million weights / s")
    result = {"threads": torch.get_num_threads(), "read_bytes_per_second": rate, "rows": rows}
    console.print(f"wrote {write_results('fit', result)}")


def measured(shape: tuple[int, int], kind: str, rate: float) -> dict[str, Any]:
    """Weights per second of one layout: all widths in one call, and each width alone.

    `share_of_floor` is the time of reading each weight's 4 bytes once over the time taken.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(*shape, generator=generator)
    weights = torch.rand(1, shape[1], generator=generator) + 0.5
    spread = values.double().square().mean(1, keepdim=True).sqrt()

    def fit(widths: tuple[int, ...]) -> Callable[[], object]:
        starts = [gaussian_levels(b) for b in widths]
        if FITS[kind] is not fit_shared:
            starts = [start * spread for start in starts]
        return lambda: FITS[kind](values, weights, starts)

    count = values.numel()
    together = best_seconds(fit(WIDTHS))
    alone = {b: count / best_seconds(fit((b,))) for b in WIDTHS}
    return {
        "shape": list(shape), "layout": kind, "weights": count,
        "weights_per_second_per_width": len(WIDTHS) * count / together,
        "weights_per_second_alone": alone, "share_of_floor": count * 4 / rate / together,
    }  # fmt: skip


def best_seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    call()
    seconds: list[float] = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def read_rate() -> float:
    """Bytes per second at which all threads together read a tensor beyond the caches."""
    big: Tensor = torch.ones(1 << 27)
    return big.numel() * 4 / best_seconds(big.sum)


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table(title="codebook fitting, million weights / s per candidate width")
    for column in ("layer", "layout", "widths 1-4", *(f"{b} alone" for b in WIDTHS), "of floor"):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            " x ".join(map(str, row["shape"])), row["layout"],
            f"{row['weights_per_second_per_width'] / 1e6:.0f}",
            *(f"{value / 1e6:.0f}" for value in row["weights_per_second_alone"].values()),
            f"{row['share_of_floor']:.1%}",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
