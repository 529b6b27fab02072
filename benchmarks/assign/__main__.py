"""Time and proven gap of the precision programs at the size of LLaMA-2-7B.

    python -m benchmarks.assign [--budgets 1.5,2,2.5,3] [--paper-budget 1.5] [--layers 32]

1.36 million rows of its linears, with made-up statistics (lognormal row variances, lognormal
sensitivities of sites, a Gaussian's errors at each width with 3 % noise). Prints a table, writes
benchmarks/results/assign.json. Load the machine with nothing else.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import write_results
from lowra.compiler.storage import ROW_SCALES
from lowra.compiler.stored_bits import row_bits
from lowra.passes.budget.relaxation import Assignment
from lowra.passes.budget.solver import solve_knapsack, solve_two_level

LAYERS = 32
SHAPES = ((4096, 4096),) * 4 + ((11008, 4096),) * 2 + ((4096, 11008),)
ERRORS = {1: 0.363, 2: 0.1175, 3: 0.0345, 4: 0.0095, 8: 4.2e-5}
EFFORT = 0.1
"""Deterministic CP-SAT seconds, as assign-precision gives it."""


def synthetic_rows(
    layers: int, widths: tuple[int, ...], seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns [rows], expected losses and stored bits [rows, widths] of a Llama's linears."""
    random = np.random.default_rng(seed)
    sites = SHAPES * layers
    k = np.concatenate([np.full(n, k) for n, k in sites])
    site = np.repeat(np.arange(len(sites)), [n for n, _ in sites])
    scale = (
        k * np.exp(random.normal(0, 1, len(k))) * np.exp(random.normal(0, 1.5, len(sites)))[site]
    )
    errors = np.array([ERRORS[width] for width in widths])
    cost = scale[:, None] * errors * np.exp(random.normal(0, 0.03, (len(k), len(widths))))
    of_k = {kk: [row_bits(kk, w, ROW_SCALES, True) for w in widths] for _, kk in SHAPES}
    bits = np.where((k == 4096)[:, None], of_k[4096], of_k[11008])
    return k, cost, bits.astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budgets", default="1.5,2,2.5,3")
    parser.add_argument("--paper-budget", type=float, default=1.5)
    parser.add_argument("--layers", type=int, default=LAYERS)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for widths in ((1, 2, 3, 4), (1, 2, 3, 4, 8)):
        k, cost, bits = synthetic_rows(arguments.layers, widths)
        for budget in map(float, arguments.budgets.split(",")):
            begun = time.perf_counter()
            plan = solve_knapsack(cost, bits, int(budget * int(k.sum())), seconds=EFFORT)
            rows.append(_row("knapsack", widths, budget, plan, begun, int(k.sum())))
    widths = (1, 2, 4)
    k, cost, _ = synthetic_rows(arguments.layers, widths)
    begun = time.perf_counter()
    plan = solve_two_level(cost / k[:, None], k, widths, arguments.paper_budget)
    rows.append(
        _row("two-level (LowRA)", widths, arguments.paper_budget, plan, begun, int(k.sum()))
    )
    console = Console()
    console.print(_table(rows, len(k)))
    if arguments.layers != LAYERS:
        console.print("not the whole model: nothing is written")
        return
    result = {
        "rows": len(k), "weights": int(k.sum()), "statistics": "synthetic, seed 0",
        "load": os.getloadavg()[0], "results": rows,
    }  # fmt: skip
    console.print(f"wrote {write_results('assign', result)}")


def _row(
    method: str,
    widths: tuple[int, ...],
    budget: float,
    plan: Assignment,
    begun: float,
    weights: int,
) -> dict[str, Any]:
    return {
        "method": method, "widths": list(widths), "budget": budget,
        "seconds": time.perf_counter() - begun, "gap": plan.gap, "loss": plan.cost,
        "bits": plan.bits / weights,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], count: int) -> Table:
    table = Table(title=f"precision of {count:,} rows")
    for column in ("method", "widths", "budget", "seconds", "proven gap", "bits"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["method"], ",".join(map(str, row["widths"])), f"{row['budget']:g}",
            f"{row['seconds']:.1f}", f"{row['gap']:.1e}", f"{row['bits']:.4f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
