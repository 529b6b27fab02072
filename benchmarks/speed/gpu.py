"""Measured times of the GPU kernels beside torch's bfloat16 linear, by replay of CUDA graphs.

    python -m benchmarks.speed.gpu [--every] [--sweep] [--jobs 8]

Every product runs over weights that are together larger than the cache, both sides by turns in one
run; seconds are the least of several replays, per product. `--sweep` tries other blocks and parts;
`--every` takes all shapes of 7B, 8B and 70B Llamas, five kinds of weights and nine numbers of
tokens, 450 rows in place of 77. `--jobs` builds the kernels first, so many at once. bitsandbytes'
NF4 is measured beside them where it is installed.
Writes benchmarks/results/speed_gpu.json. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.finetune.memory import nf4_layer
from benchmarks.results_file import write_results
from benchmarks.speed.gpu_kernels import refuse_replaced, require_kernels
from lowra.backends.activations import activations
from lowra.backends.triton import integer, schedule, service
from lowra.backends.triton.tuning import entry_of
from lowra.backends.triton.weight import weight_of
from lowra.compiler.storage import UNROTATED
from lowra.workflows.bench import random_weight
from lowra.workflows.gpu_timing import COLD_BYTES, Run, device_copies, seconds_of
from lowra.workflows.tune_kernels import candidates, run_of

RANK = 16
KINDS_OF_X = ("int8", "int16")
TRELLIS = "trellis"
"""A case so named has trellis codes."""
SHAPES: tuple[tuple[str, int, int, tuple[float, ...]], ...] = (
    ("4 bits", 8192, 8192, (4,)), ("3 bits", 8192, 8192, (3,)), ("2 bits", 8192, 8192, (2,)),
    ("1 bit", 8192, 8192, (1,)), ("1.5 bits mixed", 28672, 4096, (2, 1)),
    ("2 bits", 4096, 4096, (2,)), ("1.5 bits mixed", 4096, 14336, (2, 1)),
    ("3 bits trellis", 8192, 8192, (3,)), ("2 bits trellis", 8192, 8192, (2,)),
    ("1 bit trellis", 8192, 8192, (1,)), ("1.5 bits trellis", 28672, 4096, (2, 1)),
)  # fmt: skip
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
EVERY_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
MODELS: dict[str, tuple[tuple[int, int], ...]] = {
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "70B": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
}
"""Of Llamas, [n, k]."""
KINDS = {"4 bits": (4,), "3 bits": (3,), "2 bits": (2,), "1 bit": (1,), "1.5 bits mixed": (2, 1)}
SWEPT = (
    ("4 bits", 8192, 8192, (4,), 1), ("2 bits", 8192, 8192, (2,), 1),
    ("1 bit", 8192, 8192, (1,), 1), ("2 bits", 8192, 8192, (2,), 16),
    ("2 bits", 8192, 8192, (2,), 256),
)  # fmt: skip
Row = dict[str, Any]
Case = tuple[str, int, int, tuple[float, ...]]
Copies = list[tuple[Any, ...]]


def every_case() -> list[Case]:
    """All kinds at all shapes of the models, each shape once."""
    shapes = dict.fromkeys(shape for shapes in MODELS.values() for shape in shapes)
    return [(name, n, k, widths) for n, k in shapes for name, widths in KINDS.items()]


def bandwidths() -> dict[str, float]:
    """GB/s that large tensors are copied at (read and written), and summed at (read only): what
    reads packed weights and writes little is to be measured by the second."""
    source = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    to = torch.empty_like(source)
    size = source.numel() * source.element_size()
    runs: dict[str, tuple[Run, int]] = {
        "copy": (lambda _: to.copy_(source), 4), "read": (lambda _: source.sum(), 4),
    }  # fmt: skip
    seconds = seconds_of(runs)
    return {
        "copy_gb_per_s": 2 * size / seconds["copy"] / 1e9,
        "read_gb_per_s": size / seconds["read"] / 1e9,
    }


def measured(
    name: str, n: int, k: int, widths: tuple[float, ...], tokens: tuple[int, ...] = TOKENS
) -> Iterator[Row]:
    weight = random_weight(n, k, *widths, trellis=name.endswith(TRELLIS))
    plain, turned = device_copies(replace(weight, rotation=UNROTATED)), device_copies(weight)
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16)]
    dense += [dense[0].clone() for _ in range(max(1, COLD_BYTES // (n * k * 2) - 1))]
    nf4 = nf4_copies(dense)
    size = plain[0][0].numel() * 4
    for m in tokens:
        runs = {**runs_of(m, plain, turned), **runs_beside(m, dense, nf4)}
        best = seconds_of(runs)
        refuse_replaced()
        yield {
            "case": name, "n": n, "k": k, "m": m, "bytes": size,
            **{f"{what}_us": 1e6 * seconds for what, seconds in best.items()},
            "ratio": best["dense"] / best["lowra"], "gb_per_s": size / best["lowra"] / 1e9,
            "lora_over_plain": best["lora"] / best["lowra"],
            **{f"{kind}_ratio": best["dense"] / best[kind] for kind in best if kind in KINDS_OF_X},
        }  # fmt: skip


def runs_of(m: int, plain: Copies, turned: Copies) -> dict[str, tuple[Run, int]]:
    """Our products of m tokens: as they are, rotated, with an adapter; unpacking; in integers."""
    op, op_lora = torch.ops.lowra.quantized_linear, torch.ops.lowra.quantized_linear_lora
    n, k = sum(plain[0][4][1::2]), plain[0][5]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    a = torch.randn(RANK, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(n, RANK, device="cuda", dtype=torch.bfloat16)
    runs: dict[str, tuple[Run, int]] = {
        "lowra": (lambda i: op(x, *plain[i % len(plain)], None), len(plain)),
        "rotated": (lambda i: op(x, *turned[i % len(turned)], None), len(turned)),
        "lora": (lambda i: op_lora(x, *plain[i % len(plain)], None, a, b, 1.0), len(plain)),
        "values": (
            lambda i: torch.ops.lowra.dequantize(*plain[i % len(plain)], torch.bfloat16),
            len(plain),
        ),
    }
    weight = weight_of(plain[0])
    target = service.target_of(x.device)
    assert target is not None
    for kind in KINDS_OF_X if integer.takes(weight.key, k, m, target) else ():
        runs[kind] = (in_integers(kind, runs["lowra"][0]), len(plain))
        runs[f"{kind}_rotated"] = (in_integers(kind, runs["rotated"][0]), len(turned))
        runs[f"{kind}_lora"] = (in_integers(kind, runs["lora"][0]), len(plain))
    return runs


def runs_beside(m: int, dense: list[Tensor], nf4: list[nn.Module]) -> dict[str, tuple[Run, int]]:
    """torch's product, and bitsandbytes' where it is installed."""
    x = torch.randn(m, dense[0].shape[1], device="cuda", dtype=torch.bfloat16)
    runs: dict[str, tuple[Run, int]] = {
        "dense": (lambda i: functional.linear(x, dense[i % len(dense)]), len(dense))
    }
    if nf4:
        runs["nf4"] = (lambda i: nf4[i % len(nf4)](x), len(nf4))
    return runs


def nf4_copies(dense: list[Tensor]) -> list[nn.Module]:
    """Layers of bitsandbytes that are together larger than the cache; none without it."""
    if not find_spec("bitsandbytes"):
        return []
    n, k = dense[0].shape
    site = nn.Linear(k, n, bias=False, device="meta", dtype=torch.bfloat16)
    site.weight = nn.Parameter(dense[0].cpu(), requires_grad=False)
    layer = nf4_layer(site).cuda()
    return [layer, *(copy.deepcopy(layer) for _ in range(COLD_BYTES // (n * k // 2)))]


def build_ahead(cases: Iterable[Case], tokens: tuple[int, ...], jobs: int) -> None:
    """Every kernel into Triton's cache, by `jobs` processes at once."""
    given = [(case, m) for case in cases for m in tokens]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        list(pool.map(_build, given))


def _build(given: tuple[Case, int]) -> None:
    (name, n, k, widths), m = given
    require_kernels()
    torch.set_num_threads(1)
    weight = random_weight(n, k, *widths, trellis=name.endswith(TRELLIS))
    turned, plain = (
        [tuple(a.cuda() if isinstance(a, Tensor) else a for a in made.op_args())]
        for made in (weight, replace(weight, rotation=UNROTATED))
    )
    with torch.no_grad():
        for run, _ in runs_of(m, plain, turned).values():
            run(0)


def in_integers(kind: str, run: Run) -> Run:
    """The same product where activations may be read as integers."""

    def within(i: int) -> Any:
        with activations(kind):
            return run(i)

    return within


def swept(name: str, n: int, k: int, widths: tuple[float, ...], m: int) -> Iterator[Row]:
    """Microseconds of each choice that `lowra bench --tune` tries; one that fails says why."""
    copies = device_copies(replace(random_weight(n, k, *widths), rotation=UNROTATED))
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    target, weight = service.target_of(x.device), weight_of(copies[0])
    assert target is not None
    for choice in candidates(weight, m, x.dtype, schedule.processors(x.device), target):
        row = {"case": name, "n": n, "k": k, "m": m, "choice": entry_of(choice)}
        run = run_of(x, copies, target, choice)
        try:
            run(0)
            yield {**row, "us": 1e6 * seconds_of({"it": (run, len(copies))})["it"]}
        except Exception as error:
            yield {**row, "error": str(error)[:100]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--every", action="store_true")
    parser.add_argument("--jobs", type=int, default=0)
    options = parser.parse_args()
    require_kernels()
    cases, tokens = (every_case(), EVERY_TOKENS) if options.every else (SHAPES, TOKENS)
    if options.jobs:
        build_ahead(cases, tokens, options.jobs)
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "rows": [], "sweep": []}
    found |= bandwidths()
    print(found["gpu"], *(f"{n} {found[n]:.0f}" for n in found if "per_s" in n), flush=True)
    with torch.no_grad():
        for case in cases:
            for row in measured(*case, tokens):
                found["rows"].append(row)
                print(" ".join(_text(v) for v in row.values()), flush=True)
            write_results("speed_gpu", found)
        for name, n, k, widths, m in SWEPT if options.sweep else ():
            rows = list(swept(name, n, k, widths, m))
            found["sweep"] += rows
            best = sorted((r.get("us", math.inf), str(r["choice"])) for r in rows)[:6]
            print(name, m, *best, sep="\n  ", flush=True)
            write_results("speed_gpu", found)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
