"""Time and memory of one compile of SmolLM2-135M, by stage.

    python -m benchmarks.compile [--bits 2]

Prints a table, writes benchmarks/results/compile.json. Load the machine with nothing else.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import lowra
from benchmarks.results_file import write_results
from lowra.compiler.progress import show_progress
from lowra.workflows.models import fetch_smollm2, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=float, default=2.0)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    model, _ = load_model(fetch_smollm2())
    load_seconds, load_peak = time.perf_counter() - begun, peak_bytes()
    float32_bytes = 4 * sum(p.numel() for p in model.parameters())
    with show_progress(), tempfile.TemporaryDirectory() as work:
        compressed = lowra.compile(model, bit_budget=arguments.bits, work_dir=Path(work))
    report = compressed.lowra.report
    weights = report["totals"]["weights"]
    result = {
        "model": "SmolLM2-135M-Instruct", "bit_budget": arguments.bits, "weights": weights,
        "calibration_tokens": report["calibration_tokens"],
        "load_seconds": load_seconds, "load_peak_bytes": load_peak,
        "seconds": report["seconds"], "peak_bytes": peak_bytes(),
        "float32_model_bytes": float32_bytes, "peak_ratio": peak_bytes() / float32_bytes,
        "totals": report["totals"],
    }  # fmt: skip
    console = Console()
    console.print(stage_table(report["seconds"], weights))
    console.print(
        f"peak memory {peak_bytes() / 1e6:.0f} MB, {result['peak_ratio']:.2f} times the float32 "
        f"model (after loading it: {load_peak / 1e6:.0f} MB)"
    )
    console.print(f"wrote {write_results('compile', result)}")


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stage_table(seconds: dict[str, float], weights: int) -> Table:
    table = Table(title="compile of SmolLM2-135M")
    for column in ("stage", "seconds", "million weights / s"):
        table.add_column(column, justify="right")
    for name, value in seconds.items():
        if name == "total" or "-" in name or name in ("capture", "calibration"):
            table.add_row(name, f"{value:.1f}", f"{weights / value / 1e6:.1f}")
    return table


if __name__ == "__main__":
    main()
