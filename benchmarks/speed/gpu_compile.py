"""What compiling an 8B Llama's linears takes with the heavy work on a GPU (`device="cuda"`).

    python -m benchmarks.speed.gpu_compile [--seconds 5]

One linear of each shape, the parts of its compile one by one, by turns, as a pass calls them:
tensors begin and end on the CPU, so that the way to the GPU and back counts. 2 k tokens of inputs,
codebooks of 1, 2 and 4 bits, feedback and one sweep of descent at 2 bits. A model is counted from
its 32 layers. Writes benchmarks/results/speed_gpu_compile.json. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.results_file import write_results
from benchmarks.speed.gpu_kernels import refuse_replaced, require_kernels
from benchmarks.speed.passes import loops
from lowra.compiler.offload import Offload, offload
from lowra.workflows.bench import alternate

NAME = "speed_gpu_compile"
LAYERS = 32
LINEARS = {
    (4096, 4096): (2, 2), (1024, 4096): (2, 0), (14336, 4096): (2, 1), (4096, 14336): (1, 1),
}  # fmt: skip
"""By shape [n, k]: how many a layer has, and how many inputs to count with them; q, k and v read
one, and so do gate and up."""
PER_INPUT = ("moments", "factor")
Row = dict[str, Any]


def rows_of(
    linears: Mapping[tuple[int, int], tuple[int, int]], place: Offload, seconds: float
) -> list[Row]:
    """Seconds of each part, by shape."""
    found: list[Row] = []
    for (n, k), (count, inputs) in linears.items():
        with place:
            best = alternate(loops(n, k), seconds)
        found.append({"n": n, "k": k, "count": count, "inputs": inputs, "seconds": best})
    return found


def whole(rows: list[Row], layers: int) -> Row:
    """Of a model: seconds of all parts, and weights per second of codebooks alone."""
    weights = layers * sum(row["n"] * row["k"] * row["count"] for row in rows)
    parts = {
        name: layers * sum(row["seconds"][name] * row[_counted_by(name)] for row in rows)
        for name in rows[0]["seconds"]
    }
    return {
        "weights": weights, "seconds": {**parts, "all": sum(parts.values())},
        "codebook_weights_per_second": weights / parts["lloyd"],
    }  # fmt: skip


def _counted_by(part: str) -> str:
    return "inputs" if part in PER_INPUT else "count"


def table_of(rows: list[Row], model: Row) -> Table:
    table = Table(title=f"Parts of a compile, milliseconds; a model of {LAYERS} layers, seconds")
    names = [*rows[0]["seconds"]]
    for column in ("shape", *names):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (f"{1e3 * row['seconds'][name]:,.1f}" for name in names)
        table.add_row(f"{row['count']} of {row['n']} x {row['k']}", *cells)
    table.add_row("model", *(f"{model['seconds'][name]:,.1f}" for name in names))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    seconds = parser.parse_args().seconds
    require_kernels()
    rows = rows_of(LINEARS, offload(torch.device("cuda"), []), seconds)
    model = whole(rows, LAYERS)
    refuse_replaced()
    write_results(NAME, {"gpu": torch.cuda.get_device_name(), "rows": rows, "model": model})
    Console().print(table_of(rows, model))


if __name__ == "__main__":
    main()
