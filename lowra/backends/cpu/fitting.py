"""Kernels of the ops that compiling runs on; where they cannot be built, plain torch serves."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowra.backends.cpu.tiers import best_tier
from lowra.backends.cpu.toolchain import cpu_flags, library, pointer
from lowra.backends.reference import feedback, lloyd, optimum
from lowra.backends.reference import moments as plain
from lowra.compiler.ops import LIBRARY


def moments(x: Tensor, y: Tensor | None) -> Tensor:
    built = library("moments") if len(x) and _has_fast_moments(x, y) else None
    if built is None:
        return plain.moments(x, y)
    x, y = x.contiguous(), None if y is None else y.contiguous()
    result = torch.empty(x.shape[1], x.shape[1] if y is None else y.shape[1])
    sizes = map(_int, (len(x), *result.shape))
    built.lowra_moments(
        pointer(x), None if y is None else pointer(y), pointer(result), *sizes,
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def _has_fast_moments(x: Tensor, y: Tensor | None) -> bool:
    """Whether the kernel is ahead of torch, which multiplies bfloat16 in float32 where there are
    no matrix units (AMX)."""
    pairs = all(z is None or z.dtype == torch.bfloat16 for z in (x, y))
    return pairs and "bfloat16" in best_tier().activations and "amx_bf16" not in cpu_flags()


def lloyd_rows(
    values: Tensor, weights: Tensor, starts: list[Tensor], iterations: int, tolerance: float
) -> list[Tensor]:
    built = library("lloyd")
    if built is None:
        return lloyd.lloyd_rows(values, weights, starts, iterations, tolerance)
    levels = [start.double().clone(memory_format=torch.contiguous_format) for start in starts]
    loss = _per_row(levels, values)
    stop = _int(iterations), ctypes.c_double(tolerance)
    results = (pointer(loss),)
    _run(built.lowra_lloyd_rows, values, weights, levels, *stop, *results)
    return [*levels, loss.T.contiguous()]


def lloyd_shared(
    values: Tensor, weights: Tensor, starts: list[Tensor], iterations: int, tolerance: float
) -> list[Tensor]:
    built = library("lloyd")
    if built is None:
        return lloyd.lloyd_shared(values, weights, starts, iterations, tolerance)
    levels = [start.double().clone(memory_format=torch.contiguous_format) for start in starts]
    loss = _per_row(levels, values)
    stop = _int(iterations), ctypes.c_double(tolerance)
    results = (pointer(loss),)
    _run(built.lowra_lloyd_shared, values, weights, levels, *stop, *results)
    return [*levels, loss.T.contiguous()]


def lloyd_scales(
    values: Tensor, weights: Tensor, starts: list[Tensor], iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    built = library("lloyd")
    if built is None:
        return lloyd.lloyd_scales(values, weights, starts, iterations, tolerance)
    levels = [start.double().contiguous() for start in starts]
    scale, loss = _per_row(levels, values), _per_row(levels, values)
    stop = _int(iterations), ctypes.c_double(tolerance)
    results = (pointer(scale), pointer(loss))
    _run(built.lowra_lloyd_scales, values, weights, levels, *stop, *results)
    return scale.T.contiguous(), loss.T.contiguous()


def optimal_levels(values: Tensor, weights: Tensor, counts: list[int]) -> list[Tensor]:
    built = library("lloyd")
    if built is None:
        return optimum.optimal_levels(values, weights, counts)
    levels = [torch.empty(values.shape[0], count, dtype=torch.float64) for count in counts]
    _run(built.lowra_optimal_levels, values, weights, levels)
    return levels


def _per_row(levels: Sequence[Tensor], values: Tensor) -> Tensor:
    return torch.empty(len(levels), values.shape[0], dtype=torch.float64)


def _run(
    kernel: Any, values: Tensor, weights: Tensor, levels: Sequence[Tensor], *rest: object
) -> None:
    """Call a kernel of lloyd.cpp; levels and the tensors of `rest` are written in place."""
    n, k = values.shape
    values = values.float().contiguous()
    weights = weights.float().expand(-1, k).contiguous()
    stride = 0 if weights.shape[0] == 1 else k
    pointers = (ctypes.c_void_p * len(levels))(*(t.data_ptr() for t in levels))
    counts = (ctypes.c_int64 * len(levels))(*(t.shape[-1] for t in levels))
    kernel(
        pointer(values),
        pointer(weights),
        _int(n),
        _int(k),
        _int(stride),
        pointers,
        counts,
        _int(len(levels)),
        *rest,
        torch.get_num_threads(),
    )


def feedback_codes(
    weight: Tensor, upper: Tensor, tables: Tensor, scales: Tensor | None, columns: Tensor
) -> Tensor:
    built = library("codes")
    if built is None:
        return feedback.feedback_codes(weight, upper, tables, scales, columns)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    _write_codes(built.lowra_feedback_codes, weight, upper, tables, scales, columns, codes)
    return codes


def descend_codes(
    weight: Tensor, gram: Tensor, tables: Tensor, scales: Tensor | None, columns: Tensor,
    codes: Tensor, slope: Tensor | None, sweeps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    built = library("codes")
    if built is None:
        return feedback.descend_codes(weight, gram, tables, scales, columns, codes, slope, sweeps)
    codes = codes.clone(memory_format=torch.contiguous_format)
    known = slope is not None
    start = weight if slope is None else slope
    slope = start.clone(memory_format=torch.contiguous_format)
    _write_codes(
        built.lowra_descend_codes, weight, gram, tables, scales, columns, codes,
        pointer(slope), _int(known), _int(sweeps),
    )  # fmt: skip
    return codes, slope


def _write_codes(
    kernel: Any, weight: Tensor, matrix: Tensor, tables: Tensor, scales: Tensor | None,
    columns: Tensor, codes: Tensor, *rest: object,
) -> None:  # fmt: skip
    """Call a kernel of codes.cpp; codes are written in place."""
    n, k = weight.shape
    scales = torch.ones(n, 1) if scales is None else scales
    given = [t.float().contiguous() for t in (weight, matrix, tables, scales)]
    columns = columns.long().contiguous()
    kernel(
        *map(pointer, given), pointer(columns), pointer(codes), _int(n), _int(k),
        _int(tables.shape[1]), _int(scales.shape[1]), *rest, torch.get_num_threads(),
    )  # fmt: skip


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


for _kernel in (
    moments, lloyd_rows, lloyd_shared, lloyd_scales, optimal_levels, feedback_codes, descend_codes
):  # fmt: skip
    torch.library.impl(f"lowra::{_kernel.__name__}", "CPU", _kernel, lib=LIBRARY)
