"""Gradients of codebooks and scales: that of the weight, a few rows at a time, summed by code."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lowra.backends.cpu.emit import VALUES
from lowra.backends.cpu.pieces import Part, pieces, turned_input
from lowra.backends.cpu.product import KINDS, Prepared, prepared
from lowra.backends.reference import linear as reference
from lowra.backends.reference.code_sums import gradients_of, sums_size
from lowra.compiler.half_products import product_dtype
from lowra.compiler.ops import LIBRARY


def table_gradients(
    grad: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None,
    order: Tensor, panels: list[int], k: int, group: int, seed: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dL/dcodebooks and dL/dscales of y = x W'; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    ready = prepared(packed, VALUES) if grad.dtype == x.dtype and x.dtype in KINDS else None
    if ready is None:
        return reference.table_gradients(grad, x, *packed)
    return gradients_of(_code_sums(grad, x, ready, panels), packed)


def _code_sums(grad: Tensor, x: Tensor, ready: Prepared, panels: list[int]) -> Tensor:
    """Sums of dL/dW over the weights of a code, as `gradients_of` takes them."""
    weight = ready.weight
    dtype = product_dtype(x)
    grad, turned = grad.to(dtype), turned_input(x, ready).to(dtype)
    sums = torch.empty(sums_size(panels, weight.groups))
    for rows in pieces(weight.n, weight.k, 64, grad.dtype):
        dense = (grad[:, rows].T @ turned).contiguous()
        part = Part(dense.data_ptr(), rows.start, rows.stop, 0, weight.k, KINDS[dense.dtype])
        ready.kernel.lowra_code_sums(
            ready.address, ctypes.addressof(part), sums.data_ptr(), torch.get_num_threads()
        )
    return sums


torch.library.impl("lowra::table_gradients", "CPU", table_gradients, lib=LIBRARY)
