"""Predicted times of the GPU kernels, from bytes and compiled instructions. Nothing is measured.

    python -m benchmarks.speed.gpu_predicted

For each case: packed bytes at the memory's rate, and instructions of the compiled loop at the rate
of issue and of the integer units; the largest counts, plus a fixed launch time. The first run on a
GPU is a test of these figures. Writes benchmarks/results/speed_gpu_predicted.json. Needs Triton.
"""

from __future__ import annotations

import functools
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results_file import write_results
from lowra.backends.triton.integer_codes import WORDS
from lowra.backends.triton.keys import TERNARY_ID, IntegerKey, LinearKey, weight_key
from lowra.backends.triton.schedule import integer_choice, linear_blocks
from lowra.backends.triton.static import compile_for, loop_instructions, machine_code
from lowra.backends.triton.targets import TARGETS
from lowra.compiler.packing import FORMATS, TERNARY_TILE, TILE, WORD_TRITS, row_words, width_of

PROCESSORS = 132
# An H200 by its data sheet and what others report: none of it measured here.
BYTES_PER_SECOND = 4.3e12
ISSUED_PER_SECOND = PROCESSORS * 128 * 1.98e9
INTEGER_PER_SECOND = ISSUED_PER_SECOND / 2
LAUNCH_SECONDS = 2.5e-6
INTEGER = ("LOP3", "SHF", "PRMT", "SEL", "ISETP", "IADD3", "LEA")
CASES: tuple[tuple[str, int, list[int]], ...] = (
    ("8192 x 8192, 4 bits", 8192, [4, 8192]),
    ("8192 x 8192, 2 bits", 8192, [2, 8192]),
    ("8192 x 8192, 1 bit", 8192, [1, 8192]),
    ("28672 x 4096, 1.5 bits mixed", 4096, [2, 14336, 1, 14336]),
)
"""Products of one token that decision 17 has goals for."""


KINDS = ("bfloat16", "int8", "int16")
"""What a product of one token reads its activations as."""


@functools.cache
def instructions(width: int, kind: str) -> tuple[float, float]:
    """Per weight, of the loop of a kernel for one token on sm_90: all, and those for integers."""
    target = next(t for t in TARGETS if t.name == "sm90")
    weight = weight_key([width, 8192], 8192, -1, False, False)
    if kind == "bfloat16":
        key = LinearKey(target, weight, "bfloat16", linear_blocks(1, target), split=True)
        columns = TERNARY_TILE if width == TERNARY_ID else TILE
    else:
        blocks = integer_choice((width, 8192), 8192, 1, kind == "int16", PROCESSORS).blocks
        assert blocks is not None
        key = IntegerKey(target, weight, "bfloat16", blocks, fine=kind == "int16")
        in_a_word = WORD_TRITS if width == TERNARY_ID else 32 // FORMATS[width].planes[0]
        columns = blocks.stages * WORDS * in_a_word
    loops = loop_instructions(machine_code(compile_for(key)))
    loop = max(loops, key=lambda counts: sum(counts.values()))
    weights = key.blocks.rows * columns / (32 * key.blocks.warps)
    integer = sum(n for op, n in loop.items() if op.split(".")[0] in INTEGER)
    return sum(loop.values()) / weights, integer / weights


def predicted(name: str, k: int, panels: list[int], kind: str) -> dict[str, Any]:
    """Microseconds of one product, and the ratio to bfloat16 read at the same rate. Integers take
    a launch more, of what makes them; half of it, since the product may start meanwhile."""
    pairs = list(zip(panels[0::2], panels[1::2], strict=True))
    n = sum(rows for _, rows in pairs)
    size_bytes = sum(rows * row_words(k, id) * 4 for id, rows in pairs)
    costs = [(rows * k, *instructions(id, kind)) for id, rows in pairs]
    seconds = {
        "memory": size_bytes / BYTES_PER_SECOND,
        "issue": sum(count * whole for count, whole, _ in costs) / ISSUED_PER_SECOND,
        "integer units": sum(count * alu for count, _, alu in costs) / INTEGER_PER_SECOND,
    }
    bound = max(seconds, key=lambda what: seconds[what])
    launches = 1 if kind == "bfloat16" else 1.5
    total = seconds[bound] + launches * LAUNCH_SECONDS
    dense = 2 * n * k / BYTES_PER_SECOND + LAUNCH_SECONDS
    return {
        "case": name, "activations": kind, "megabytes": size_bytes / 1e6, "bound by": bound,
        **{f"{what} us": 1e6 * value for what, value in seconds.items()},
        "predicted us": 1e6 * total, "predicted ratio to bfloat16": dense / total,
    }  # fmt: skip


def main() -> None:
    rows = [predicted(*case, kind) for kind in KINDS for case in CASES]
    table = Table(title="predicted on an H200, not measured")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console(width=160)
    console.print(table)
    counted = {
        f"{width_of(id):g} bits": {
            kind: [round(n, 2) for n in instructions(id, kind)] for kind in KINDS
        }
        for id in (1, 9, 2, 3, 4)
    }
    for width, counts in counted.items():
        console.print(f"{width}: instructions per weight, and those for integers: {counts}")
    path = write_results(
        "speed_gpu_predicted",
        {"measured": False, "device": "H200", "instructions": counted, "rows": rows},
    )
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
