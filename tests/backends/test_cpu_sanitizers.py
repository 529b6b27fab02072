"""Every emitted kernel under AddressSanitizer and UBSan, on odd shapes, against the reference.

Slow: a sanitized kernel takes long to build. `pytest -m slow` runs it.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowra.backends.cpu import product, toolchain
from lowra.backends.cpu.emit import LOOKED_UP, VALUES, KernelKey, emit
from lowra.backends.cpu.tiers import Tier
from tests.backends.test_cpu_product import (
    EVERY_KERNEL,
    NAMES,
    ROUNDING,
    RUNNABLE,
    TOLERANCE,
    Shape,
    packed_of,
    worst,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(toolchain.find_compiler() is None, reason="no C++ compiler"),
]
DRIVER = Path(__file__).with_name("sanitized_driver.cpp")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O0")
ALL = (1, 2, 3, 4, 8, 9)
TRELLIS = (4, 8, 9, 11, 12, 13)
CASES = [
    (Shape(33, 7, ALL, seed=1), 1, 1),
    (Shape(17, 96, (9,), shared=False, seed=2), 2, 16),
    (Shape(50, 576, ALL, block=64, seed=3), 1, 16),
    (Shape(21, 650, (1, 2, 3, 4, 9), seed=4), 3, 5),
    (Shape(18, 1290, ALL, shared=False, block=2, seed=5), 11, 17),
    (Shape(40, 321, (1, 9), group=0, seed=6), 19, 0),
    (Shape(19, 224, (4, 3), group=40, seed=7), 4, 3),
    (Shape(1, 1, (2,), seed=8), 1, 1),
    (Shape(83, 600, (2, 4), block=8, seed=9), 15, 16),
    (Shape(150, 7, TRELLIS, shared=False, seed=10), 1, 1),
    (Shape(33, 650, (13,), seed=11), 3, 5),
    (Shape(190, 288, TRELLIS, group=32, seed=12), 4, 3),
    (Shape(201, 570, TRELLIS, seed=13), 1, 0),
    (Shape(270, 96, (12, 11), seed=14), 19, 2),
]


def build(tier: Tier, name: str, folder: Path) -> Path:
    """The driver with the kernel that serves all widths, both sanitized."""
    kernel, program = folder / "kernel.cpp", folder / "driver"
    kernel.write_text(emit(KernelKey(tier, name, LOOKED_UP if tier.vectors else ())))
    done = subprocess.run(
        [
            str(toolchain.find_compiler()), "-std=c++17", "-pthread", "-w", *SANITIZERS,
            *tier.options, *(["-DUNPACKS"] if name == VALUES else []), f'-DKERNEL="{kernel}"',
            str(DRIVER), "-o", str(program),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip("the compiler came without sanitizers")
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, arrays: list[Tensor | None], folder: Path) -> list[bytes]:
    given, results = folder / "case.bin", folder / "results.bin"
    with given.open("wb") as file:
        for array in arrays:
            raw = b"" if array is None else array.contiguous().view(torch.uint8).numpy().tobytes()
            file.write(len(raw).to_bytes(8, "little") + raw)
    done = subprocess.run(
        [str(program), str(given), str(results)], capture_output=True, text=True, check=False,
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    raw, found = results.read_bytes(), []
    while raw:
        size = int.from_bytes(raw[:8], "little")
        found.append(raw[8 : 8 + size])
        raw = raw[8 + size :]
    return found


@pytest.mark.parametrize(
    ("tier", "name"), [*EVERY_KERNEL, *((tier, VALUES) for tier in RUNNABLE)],
    ids=[*NAMES, *(f"{tier.name} {VALUES}" for tier in RUNNABLE)],
)  # fmt: skip
def test_no_kernel_touches_what_is_not_its_own(tier: Tier, name: str, tmp_path: Path) -> None:
    program = build(tier, name, tmp_path)
    for place, (shape, m, rank) in enumerate(CASES):
        if shape.group > 0 and tier.vectors:
            continue  # such weights have a kernel without look-ups
        dtype = (torch.float32, torch.bfloat16, torch.float16)[place % 3]
        check(program, tier, name, shape, m, rank, dtype, tmp_path)


def check(
    program: Path, tier: Tier, name: str, shape: Shape, m: int, rank: int, dtype: torch.dtype,
    folder: Path,
) -> None:  # fmt: skip
    packed, generator = packed_of(shape), torch.Generator().manual_seed(shape.seed)
    ready: Any = product.prepared(packed.op_args(), name, tier)
    weight, n, k = ready.weight, shape.n, shape.k
    panels = [value for p in range(weight.panels) for value in (weight.widths[p], weight.rows[p])]
    derived = product.derived_bytes(
        KernelKey(tier, name, LOOKED_UP if tier.vectors else ()), panels, bool(weight.shared)
    )
    numbers = [
        n, k, weight.group, weight.groups, weight.block, weight.shared, m, rank,
        product.KINDS[dtype], derived, *panels,
    ]  # fmt: skip
    turn = None
    if weight.signs:
        raw = ctypes.string_at(weight.signs, 4 * k)
        turn = torch.from_numpy(np.frombuffer(raw, np.float32).copy())
    x = torch.randn(m, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    a = (torch.randn(rank, k, generator=generator) / k**0.5).to(dtype)
    b = torch.randn(n, rank, generator=generator).to(dtype)
    raw_y, raw_values = run(
        program,
        [
            packed.codes, packed.codebooks, packed.scales, packed.order, turn,
            torch.tensor(numbers), x, bias, a, b,
        ],
        folder,
    )  # fmt: skip
    dense = packed.dequantize(torch.float64)
    if name == VALUES:
        values = torch.frombuffer(bytearray(raw_values), dtype=dtype).view(n, k)
        if weight.block == 1:
            error = float((values.double() - dense).abs().max())
            assert error <= ROUNDING[dtype] * 2 * float(dense.abs().max())
        return
    y = torch.frombuffer(bytearray(raw_y), dtype=dtype).view(m, n)
    want = x.double() @ dense.T + bias.double()
    want += 0.5 * (x.double() @ a.double().T) @ b.double().T
    assert worst(y, x, packed, want) < TOLERANCE[name] + 1e-6 * (rank + 1)
