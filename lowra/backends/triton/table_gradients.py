"""Gradients of codebooks and scales on CUDA and ROCm devices: dL/dW, some columns at a time, summed
by code.

Codes are read by the kernel that unpacks values, from codebooks that hold 0, 1, 2, ...: exact in
float16. Sums are products with a matrix of ones, so that no order of arrival changes a bit.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowra.backends.reference import linear as reference
from lowra.backends.reference.code_sums import gradients_of, panel_sums, sums_size
from lowra.backends.triton import launch
from lowra.backends.triton.linear import COLUMNS, ready
from lowra.backends.triton.service import served, target_of
from lowra.backends.triton.targets import Target
from lowra.backends.triton.weight import Form, Weight
from lowra.compiler.ops import LIBRARY
from lowra.compiler.packing import levels_of
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import scale_groups

PIECE_BYTES = 64 << 20
"""Of dL/dW, float32, that is held at a time, or of COLUMNS columns where those are more. Not
measured."""


def table_gradients(
    grad: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None,
    order: Tensor, panels: list[int], k: int, group: int, seed: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dL/dcodebooks and dL/dscales of y = x W'; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    target = target_of(grad.device)
    weight = ready(packed, x.dtype, target) if grad.dtype == x.dtype else None

    def plain() -> tuple[Tensor, Tensor]:
        return reference.table_gradients(grad, x, *packed)

    if weight is None or target is None:
        return plain()
    return served(lambda: by_codes(grad, x, packed, weight, target), plain)


def by_codes(
    grad: Tensor, x: Tensor, packed: tuple[Any, ...], weight: Weight, target: Target
) -> tuple[Tensor, Tensor]:
    """The same, by the kernels."""
    _, _, scales, order, panels, k, group, seed, block = packed
    group = k if scales is None or group < 0 else group
    groups = scale_groups(k, group)
    sums = torch.zeros(sums_size(panels, groups), device=grad.device)
    turned = launch.rotated(x.contiguous(), Rotation(seed, block), target)
    rows = grad[:, order.long()].T
    index = _index(weight)
    step = max(COLUMNS, PIECE_BYTES // (4 * max(1, weight.n)) // COLUMNS * COLUMNS)
    for start in range(0, k, step):
        columns = slice(start, min(k, start + step))
        dense = _product(rows, turned[:, columns], target)
        found = launch.values(index, torch.float16, target, columns)
        first, last = start // group, -(-columns.stop // group)
        members = _members(columns, group, first, last, grad.device)
        for row, levels, part in panel_sums(sums, panels, groups):
            here = slice(row, row + part.shape[0])
            for level in range(levels):
                chosen = torch.where(found[here] == level, dense[here], 0.0)
                part[:, first:last, level] += chosen @ members
    return gradients_of(sums, packed)


def _product(a: Tensor, b: Tensor, target: Target) -> Tensor:
    """a b in float32: half precision would overflow, and float32 inputs would be slow."""
    if target.backend == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _index(weight: Weight) -> Weight:
    """A weight whose values are its codes, rows as they are stored."""
    key = replace(weight.key, group=0, permuted=False)
    books = _counting_books(weight.panels, key.own, weight.books.device)
    form = Form(weight.panels, weight.n, weight.k, key, weight.form.dtypes)
    return replace(weight, books=books, scales=None, form=form)


@functools.lru_cache(maxsize=8)
def _counting_books(panels: tuple[int, ...], own: bool, device: torch.device) -> Tensor:
    tables = [
        torch.arange(levels_of(id), dtype=torch.float16).repeat(rows if own else 1)
        for id, rows in zip(panels[0::2], panels[1::2], strict=True)
    ]
    return torch.cat(tables).to(device)


def _members(columns: slice, group: int, first: int, last: int, device: torch.device) -> Tensor:
    """float32 [columns, groups]: 1 where a column belongs to a group."""
    of_columns = torch.arange(columns.start, columns.stop, device=device) // group
    return (of_columns[:, None] == torch.arange(first, last, device=device)).float()


torch.library.impl("lowra::table_gradients", "CUDA", table_gradients, lib=LIBRARY)
