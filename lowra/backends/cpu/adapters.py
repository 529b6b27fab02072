"""The kernel of `lowra::apply_adapters`; where it cannot be built, plain torch serves."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowra.backends.cpu.toolchain import library, pointer
from lowra.backends.reference import adapters as reference
from lowra.compiler.adapter_ops import require_rows
from lowra.compiler.errors import AdapterError
from lowra.compiler.grids import level_tables
from lowra.compiler.ops import LIBRARY


def apply_adapters(
    y: Tensor, x: Tensor, pages: Tensor, chunks: Tensor, bounds: Tensor, scalings: Tensor,
    slots: Tensor, weights: Tensor, rank: int,
) -> Tensor:  # fmt: skip
    """y + sum over j of w_j (f_j(y) - y); see the reference. In float32.

    Raises AdapterError for chunks that leave the pages or do not fit the linear, and for slots and
    weights of other rows.
    """
    require_rows(y, x, slots, weights)
    built = None if y.dtype == torch.float64 else library("adapters")
    if built is None:
        tables = (pages, chunks, bounds, scalings, slots, weights)
        return reference.apply_adapters(y, x, *tables, rank)
    (m, n), k = y.shape, x.shape[1]
    base, inputs = y.float().contiguous(), x.float().contiguous()
    sums = base.clone()
    held = (pages.contiguous(), chunks.int().contiguous(), bounds.int().contiguous())
    scales, which = scalings.float().contiguous(), slots.int().contiguous()
    shares, tables = weights.float().contiguous(), level_tables()
    size = ctypes.c_int64
    run = built.lowra_apply_adapters
    run.restype = size
    wrong = run(
        *map(pointer, (base, inputs, sums)), size(m), size(n), size(k),
        pointer(held[0]), size(held[0].numel()), pointer(held[1]), size(len(held[1])),
        pointer(held[2]), pointer(scales), size(len(scales)), pointer(which), pointer(shares),
        size(which.shape[1]), pointer(tables), torch.get_num_threads(),
    )  # fmt: skip
    if wrong:
        raise AdapterError(
            f"the chunks of slot {wrong - 1} leave the pages, or do not fit a linear [{n}, {k}]"
        )
    return sums.to(y.dtype)


torch.library.impl("lowra::apply_adapters", "CPU", apply_adapters, lib=LIBRARY)
