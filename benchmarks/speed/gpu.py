"""Measured times of the GPU kernels beside torch's bfloat16 linear, by replay of CUDA graphs.

    python -m benchmarks.speed.gpu [--sweep]

Every product runs over weights that are together larger than the cache, both sides by turns in one
run; seconds are the least of several replays, per product. `--sweep` tries other blocks and parts.
Writes benchmarks/results/speed_gpu.json. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.results_file import write_results
from lowra.backends.triton import launch, linear, schedule
from lowra.backends.triton.keys import Blocks
from lowra.compiler.storage import UNROTATED, PackedWeight
from lowra.workflows.bench import random_weight

COLD_BYTES = 256 << 20
MOST_COPIES = 64
TURNS = 7
RANK = 16
SHAPES: tuple[tuple[str, int, int, tuple[float, ...]], ...] = (
    ("4 bits", 8192, 8192, (4,)), ("3 bits", 8192, 8192, (3,)), ("2 bits", 8192, 8192, (2,)),
    ("1 bit", 8192, 8192, (1,)), ("1.5 bits mixed", 28672, 4096, (2, 1)),
    ("2 bits", 4096, 4096, (2,)), ("1.5 bits mixed", 4096, 14336, (2, 1)),
)  # fmt: skip
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
SWEPT = (
    ("4 bits", 8192, 8192, (4,), 1), ("2 bits", 8192, 8192, (2,), 1),
    ("1 bit", 8192, 8192, (1,), 1), ("2 bits", 8192, 8192, (2,), 16),
    ("2 bits", 8192, 8192, (2,), 256),
)  # fmt: skip
FEW = tuple(
    (Blocks(rows, 16, warps, stages), parts)
    for (rows, warps), stages, parts in itertools.product(
        ((64, 4), (128, 4), (128, 8)), (2, 3, 4), (1, 2, 3, 4)
    )
)
MANY = tuple(
    (Blocks(*sizes), 4)
    for sizes in (
        (128, 128, 8, 3), (128, 128, 4, 3), (64, 128, 4, 3), (128, 256, 8, 3), (128, 64, 4, 4),
        (64, 256, 4, 3), (256, 128, 8, 2), (128, 128, 8, 2), (128, 128, 8, 4),
    )
)  # fmt: skip

Row = dict[str, Any]
Run = Callable[[int], object]


def copies_of(weight: PackedWeight) -> list[tuple[Any, ...]]:
    codes, *rest = (a.cuda() if isinstance(a, Tensor) else a for a in weight.op_args())
    assert isinstance(codes, Tensor)
    count = max(2, min(MOST_COPIES, -(-COLD_BYTES // (codes.numel() * 4))))
    return [(codes.clone(), *rest) for _ in range(count)]


def graph_of(run: Run, count: int) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for turn in range(2):
            run(turn)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for turn in range(count):
            run(turn)
    return graph


def seconds_of(runs: dict[str, tuple[Run, int]]) -> dict[str, float]:
    """Least seconds of one product of each, by turns; a run comes with its number of copies."""
    graphs = {name: (graph_of(run, count), count) for name, (run, count) in runs.items()}
    best = dict.fromkeys(graphs, float("inf"))
    for _ in range(TURNS):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            best[name] = min(best[name], start.elapsed_time(end) / 1e3 / count)
    return best


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    to = torch.empty_like(source)
    return 2 * source.numel() / seconds_of({"copy": (lambda _: to.copy_(source), 4)})["copy"]


def measured(name: str, n: int, k: int, widths: tuple[float, ...]) -> Iterator[Row]:
    op, op_lora = torch.ops.lowra.quantized_linear, torch.ops.lowra.quantized_linear_lora
    weight = random_weight(n, k, *widths)
    plain, turned = copies_of(replace(weight, rotation=UNROTATED)), copies_of(weight)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16)]
    dense += [dense[0].clone() for _ in range(max(1, COLD_BYTES // (n * k * 2) - 1))]
    a = torch.randn(RANK, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, RANK, device="cuda", dtype=torch.bfloat16)
    size = plain[0][0].numel() * 4
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        runs: dict[str, tuple[Run, int]] = {
            "lowra": (lambda i, x=x: op(x, *plain[i % len(plain)], None), len(plain)),
            "rotated": (lambda i, x=x: op(x, *turned[i % len(turned)], None), len(turned)),
            "lora": (
                lambda i, x=x: op_lora(x, *plain[i % len(plain)], None, a, b, 1.0), len(plain),
            ),
            "values": (
                lambda i: torch.ops.lowra.dequantize(*plain[i % len(plain)], torch.bfloat16),
                len(plain),
            ),
            "dense": (lambda i, x=x: functional.linear(x, dense[i % len(dense)]), len(dense)),
        }  # fmt: skip
        best = seconds_of(runs)
        yield {
            "case": name, "n": n, "k": k, "m": m, "bytes": size,
            **{f"{what}_us": 1e6 * seconds for what, seconds in best.items()},
            "ratio": best["dense"] / best["lowra"], "gb_per_s": size / best["lowra"] / 1e9,
            "lora_over_plain": best["lora"] / best["lowra"],
        }  # fmt: skip


def swept(name: str, n: int, k: int, widths: tuple[float, ...], m: int) -> Iterator[Row]:
    """Microseconds by blocks, in the order of the table; a kernel that fails says why."""
    copies = copies_of(replace(random_weight(n, k, *widths), rotation=UNROTATED))
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    was = launch.linear_blocks, schedule.PROGRAMS_PER_PROCESSOR
    for blocks, parts in FEW if m <= 16 else MANY:
        launch.linear_blocks = lambda *_, blocks=blocks: blocks
        schedule.PROGRAMS_PER_PROCESSOR = parts
        target = linear.target_of(x.device)
        weight = linear.weight_of(copies[0])
        row = {"case": name, "n": n, "k": k, "m": m, "blocks": str(blocks), "parts": parts}
        try:
            assert target is not None
            launch.product(x, weight, target, None)
            run = partial(_product, x, copies, target)
            yield {**row, "us": 1e6 * seconds_of({"it": (run, len(copies))})["it"]}
        except Exception as error:
            yield {**row, "error": str(error)[:100]}
    launch.linear_blocks, schedule.PROGRAMS_PER_PROCESSOR = was


def _product(x: Tensor, copies: list[tuple[Any, ...]], target: Any, turn: int) -> Tensor:
    return launch.product(x, linear.weight_of(copies[turn % len(copies)]), target, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    sweep = parser.parse_args().sweep
    os.environ[linear.SWITCH] = "on"
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "rows": [], "sweep": []}
    found["copy_gb_per_s"] = copy_bandwidth() / 1e9
    print(found["gpu"], f"copy {found['copy_gb_per_s']:.0f} GB/s", flush=True)
    with torch.no_grad():
        for case in SHAPES:
            for row in measured(*case):
                found["rows"].append(row)
                print(" ".join(_text(v) for v in row.values()), flush=True)
            write_results("speed_gpu", found)
        for name, n, k, widths, m in SWEPT if sweep else ():
            rows = list(swept(name, n, k, widths, m))
            found["sweep"] += rows
            best = sorted((r.get("us", math.inf), r["blocks"], r["parts"]) for r in rows)[:6]
            print(name, m, *best, sep="\n  ", flush=True)
            write_results("speed_gpu", found)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
