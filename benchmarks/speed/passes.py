"""The loops that compiling spends its time in, and what a new process pays before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from lowra.passes.rounding.feedback import descend_codes, factorize, feedback_codes
from lowra.passes.rounding.lloyd import fit_shared, gaussian_levels
from lowra.workflows.bench import alternate

SHAPES = ((4096, 4096), (1536, 576), (576, 1536))
FITTED = (1, 2, 4)
LEVELS = 4

Row = dict[str, Any]


def passes(seconds: float) -> list[Row]:
    """Weights per second, all threads: Lloyd for three widths together, error feedback at
    2 bits, one sweep of coordinate descent."""
    return [_pass_row(n, k, seconds) for n, k in SHAPES]


def _pass_row(n: int, k: int, seconds: float) -> Row:
    parts = loops(n, k)
    best = alternate({name: parts[name] for name in ("lloyd", "feedback", "descent")}, seconds)
    rates = {name: n * k / value for name, value in best.items()}
    return {"n": n, "k": k, "weights_per_second": rates, "threads": torch.get_num_threads()}


def loops(n: int, k: int) -> dict[str, Callable[[int], object]]:
    """What a compile does to a weight [n, k], each part by itself."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    x = torch.randn(2 * k, k, generator=generator)
    halves, gram = x.bfloat16(), x.T @ x / len(x)
    factor = factorize(gram)
    table = gaussian_levels(2).float().expand(n, LEVELS).contiguous()
    mass = torch.rand(1, k, generator=generator) + 0.5
    starts = [gaussian_levels(width) for width in FITTED]
    codes = feedback_codes(weight, factor, table, None, 0)
    return {
        "moments": lambda _: torch.ops.lowra.moments(halves, None),
        "factor": lambda _: factorize(gram),
        "lloyd": lambda _: fit_shared(weight, mass, starts),
        "feedback": lambda _: feedback_codes(weight, factor, table, None, 0),
        "descent": lambda _: descend_codes(weight, gram, table, None, 0, codes, 1),
    }


START = """
import time
begun = time.perf_counter()
import torch, lowra
imported = time.perf_counter()
from lowra.compiler.ops import linear
from lowra.workflows.bench import random_weight
packed = random_weight(64, 576, 2).op_args()
x = torch.ones(1, 576, dtype=torch.bfloat16)
ready = time.perf_counter()
linear(x, packed, None, None)
first = time.perf_counter()
linear(x, packed, None, None)
print(imported - begun, first - ready, time.perf_counter() - first)
"""
"""Seconds of `import torch, lowra`, of the first product, of the second."""


def start() -> Row:
    """Seconds of a first product with an empty kernel cache and with a full one, each in a new
    process; of importing torch and lowra; and of torch alone."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"LOWRA_HOME": home}
        cold = _measured(START, environment)
        warm = min((_measured(START, environment) for _ in range(3)), key=lambda row: row[1])
    alone = "import time; b = time.perf_counter(); import torch; print(time.perf_counter() - b)"
    return {
        "first_use_seconds": cold[1], "cached_seconds": warm[1] - warm[2],
        "import_seconds": warm[0], "import_torch_seconds": _measured(alone, os.environ.copy())[0],
    }  # fmt: skip


def _measured(script: str, environment: dict[str, str]) -> list[float]:
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"after {time.perf_counter() - begun:.1f} s: {done.stderr}")
    return [float(word) for word in done.stdout.split()]
