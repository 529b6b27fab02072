"""Kernels of the ops that a compressed model runs on: unpacking in C++, products in torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowra.backends.cpu.toolchain import library, pointer
from lowra.backends.reference import linear
from lowra.compiler.ops import LIBRARY
from lowra.compiler.packing import levels_of, row_words
from lowra.compiler.storage import scale_groups


def stored_rows(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W [n, k] in original row order and stored coordinates; see the reference."""
    built = None if dtype == torch.float64 else library("dequantize")
    if built is None:
        return linear.stored_rows(codes, codebooks, scales, order, panels, k, group, dtype)
    tables, words, order = codebooks.float().contiguous(), codes.contiguous(), order.int()
    factors = None if scales is None else scales.float().contiguous()
    shared = _check(words, tables, factors, order, panels, k, group)
    groups = 1 if factors is None else scale_groups(k, group)
    half = dtype == torch.bfloat16
    weight = torch.empty(order.shape[0], k, dtype=dtype if half else torch.float32)
    built.lowra_dequantize(
        pointer(words), pointer(tables), None if factors is None else pointer(factors),
        pointer(order), (ctypes.c_int64 * len(panels))(*panels), ctypes.c_int64(len(panels) // 2),
        ctypes.c_int64(k), ctypes.c_int64(max(group, 0)), ctypes.c_int64(groups),
        int(shared), int(half), pointer(weight), torch.get_num_threads(),
    )  # fmt: skip
    return weight.to(dtype)


def _check(
    words: Tensor, tables: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int,
) -> bool:  # fmt: skip
    """Whether codebooks are shared. Raises ValueError where a size is not what the kernel reads."""
    pairs = list(zip(panels[0::2], panels[1::2], strict=True))
    rows = sum(count for _, count in pairs)
    shared = tables.numel() == sum(levels_of(id) for id, _ in pairs)
    sizes = [
        ("code words", words.numel(), sum(count * row_words(k, id) for id, count in pairs)),
        ("row numbers", order.numel(), rows),
    ]
    if not shared:
        values = sum(count * levels_of(id) for id, count in pairs)
        sizes.append(("codebook values", tables.numel(), values))
    if scales is not None:
        sizes.append(("scales", scales.numel(), rows * scale_groups(k, group)))
    for what, got, want in sizes:
        if got != want:
            raise ValueError(f"a packed weight [{rows}, {k}] has {got} {what}, not {want}")
    if rows and not 0 <= int(order.min()) <= int(order.max()) < rows:
        raise ValueError(f"a row number of a packed weight [{rows}, {k}] is out of range")
    return shared


for _name, _kernel in linear.kernels(stored_rows).items():
    torch.library.impl(f"lowra::{_name}", "CPU", _kernel, lib=LIBRARY)
