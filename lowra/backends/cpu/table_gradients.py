"""Gradients of codebooks and scales: that of the weight, a few rows at a time, summed by code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowra.backends.cpu.emit import VALUES
from lowra.backends.cpu.pieces import Part, pieces, turned_input
from lowra.backends.cpu.product import KINDS, Prepared, prepared
from lowra.backends.reference import linear as reference
from lowra.compiler.half_products import product_dtype
from lowra.compiler.ops import LIBRARY
from lowra.compiler.packing import levels_of


def table_gradients(
    grad: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None,
    order: Tensor, panels: list[int], k: int, group: int, seed: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dL/dcodebooks and dL/dscales of y = x W'; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    ready = prepared(packed, VALUES) if grad.dtype == x.dtype and x.dtype in KINDS else None
    if ready is None:
        return reference.table_gradients(grad, x, *packed)
    return _of_tables(_code_sums(grad, x, ready, panels), packed)


def _code_sums(grad: Tensor, x: Tensor, ready: Prepared, panels: list[int]) -> Tensor:
    """float32, panel after panel [rows, groups, levels]: sums of dL/dW over a code's weights."""
    weight = ready.weight
    dtype = product_dtype(x)
    grad, turned = grad.to(dtype), turned_input(x, ready).to(dtype)
    counts = zip(panels[0::2], panels[1::2], strict=True)
    sums = torch.empty(sum(rows * levels_of(id) for id, rows in counts) * weight.groups)
    for rows in pieces(weight.n, weight.k, 64, grad.dtype):
        dense = (grad[:, rows].T @ turned).contiguous()
        part = Part(dense.data_ptr(), rows.start, rows.stop, 0, weight.k, KINDS[dense.dtype])
        ready.kernel.lowra_code_sums(
            ready.address, ctypes.addressof(part), sums.data_ptr(), torch.get_num_threads()
        )
    return sums


def _of_tables(sums: Tensor, packed: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """A level's gradient is the sum of scale times sum over the rows that share it; a scale's is
    that of level times sum over the codes."""
    _, codebooks, scales, order, panels, *_ = packed
    groups = sums.new_ones(order.shape[0], 1) if scales is None else scales.view(order.shape[0], -1)
    shared = codebooks.numel() == sum(levels_of(id) for id in panels[0::2])
    of_levels, of_scales = [], []
    for levels, part, factors, table in _by_panel(sums, groups, codebooks, panels, shared):
        rows = (part * factors.unsqueeze(2)).sum(1)
        of_levels.append(rows.sum(0) if shared else rows.reshape(-1))
        of_scales.append((part * table.view(-1, 1, levels)).sum(2).reshape(-1))
    return torch.cat(of_levels), torch.cat(of_scales if scales is not None else [sums[:0]])


def _by_panel(
    sums: Tensor, scales: Tensor, codebooks: Tensor, panels: list[int], shared: bool
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(levels, sums [rows, groups, levels], scales [rows, groups], its codebooks) per panel."""
    row = at = value = 0
    for id, rows in zip(panels[0::2], panels[1::2], strict=True):
        levels, groups = levels_of(id), scales.shape[1]
        size, values = rows * groups * levels, (1 if shared else rows) * levels
        yield (
            levels, sums[at : at + size].view(rows, groups, levels),
            scales[row : row + rows].float(), codebooks[value : value + values].float(),
        )  # fmt: skip
        row, at, value = row + rows, at + size, value + values


torch.library.impl("lowra::table_gradients", "CPU", table_gradients, lib=LIBRARY)
