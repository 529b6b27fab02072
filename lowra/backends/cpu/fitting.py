"""Kernels of the ops that compiling runs on; where they cannot be built, plain torch serves."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowra.backends.cpu.tiers import best_tier
from lowra.backends.cpu.toolchain import cpu_flags, library, pointer
from lowra.backends.reference import feedback, lloyd, optimum
from lowra.backends.reference import moments as plain
from lowra.backends.reference.paths import places_of
from lowra.compiler.ops import LIBRARY
from lowra.compiler.trellis import RUN


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
    weight: Tensor, upper: Tensor | None, tables: Tensor, scales: Tensor | None, columns: Tensor,
    runs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    built = library("codes")
    if built is None:
        return feedback.feedback_codes(weight, upper, tables, scales, columns, runs)
    blocks = blocks_of(len(weight), runs)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    _write_codes(
        built.lowra_feedback_codes, blocks, blocks.sorted(weight), upper, tables, scales, columns,
        codes,
    )  # fmt: skip
    return blocks.put_back(codes)


def descend_codes(
    weight: Tensor, gram: Tensor, tables: Tensor, scales: Tensor | None, columns: Tensor,
    codes: Tensor, slope: Tensor | None, sweeps: int, runs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    built = library("codes")
    if built is None:
        given = (weight, gram, tables, scales, columns, codes, slope, sweeps, runs)
        return feedback.descend_codes(*given)
    blocks = blocks_of(len(weight), runs)
    weight = blocks.sorted(weight)
    codes = blocks.sorted(codes).clone(memory_format=torch.contiguous_format)
    known = slope is not None
    start = weight if slope is None else blocks.sorted(slope)
    slope = start.clone(memory_format=torch.contiguous_format)
    _write_codes(
        built.lowra_descend_codes, blocks, weight, gram, tables, scales, columns, codes,
        pointer(slope), _int(known), _int(sweeps),
    )  # fmt: skip
    return blocks.put_back(codes), blocks.put_back(slope)


@dataclass(frozen=True)
class Blocks:
    """Rows as codes.cpp takes them: 64 rows of their own, or a run of trellis codes.

    order: int64 [n], the rows block after block; None where they lie so. starts: int64
    [blocks + 1], the first of each block, then n. runs: int64 [blocks], 1 for a run.
    """

    order: Tensor | None
    starts: Tensor
    runs: Tensor

    def sorted(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else rows[self.order]

    def put_back(self, rows: Tensor) -> Tensor:
        """The inverse of `sorted`."""
        if self.order is None:
            return rows
        return torch.empty_like(rows).index_copy_(0, self.order, rows)


def blocks_of(n: int, runs: Tensor | None) -> Blocks:
    """The blocks of `n` rows. Raises ValueError for a run that is too long."""
    alone = n if runs is None else int((runs < 0).sum())
    starts = [*range(0, alone, RUN)]
    flags = [0] * len(starts)
    order = None
    if runs is not None:
        places = places_of(runs)
        order = torch.cat(((runs < 0).nonzero().squeeze(1), places[places < n]))
        ends = alone + (places < n).sum(1).cumsum(0)
        order = None if torch.equal(order, torch.arange(n)) else order
        starts += [alone, *ends.tolist()[:-1]]
        flags += [1] * len(ends)
    return Blocks(order, torch.tensor([*starts, n]), torch.tensor(flags))


def _write_codes(
    kernel: Any, blocks: Blocks, weight: Tensor, matrix: Tensor | None, tables: Tensor,
    scales: Tensor | None, columns: Tensor, codes: Tensor, *rest: object,
) -> None:  # fmt: skip
    """Call a kernel of codes.cpp on sorted rows; tables and scales are sorted here, codes are
    written in place."""
    n, k = weight.shape
    scales = torch.ones(n, 1) if scales is None else scales
    of_rows = (weight, blocks.sorted(tables), blocks.sorted(scales))
    weight, tables, scales = (t.float().contiguous() for t in of_rows)
    matrix = None if matrix is None else matrix.float().contiguous()
    columns = columns.long().contiguous()
    kernel(
        pointer(weight), None if matrix is None else pointer(matrix), pointer(tables),
        pointer(scales), pointer(columns), pointer(codes), _int(len(blocks.runs)), _int(k),
        _int(tables.shape[1]), _int(scales.shape[1]), pointer(blocks.starts), pointer(blocks.runs),
        *rest, torch.get_num_threads(),
    )  # fmt: skip


def _int(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


for _kernel in (
    moments, lloyd_rows, lloyd_shared, lloyd_scales, optimal_levels, feedback_codes, descend_codes
):  # fmt: skip
    torch.library.impl(f"lowra::{_kernel.__name__}", "CPU", _kernel, lib=LIBRARY)
