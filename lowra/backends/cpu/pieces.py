"""Products with many tokens: weights are unpacked into cache in pieces, and torch multiplies."""

from __future__ import annotations

import ctypes
import math
import threading
import weakref

import torch
from torch import Tensor
from torch.nn import functional

from lowra.backends.cpu.product import KINDS, Prepared
from lowra.compiler.half_products import product_dtype
from lowra.compiler.packing import TERNARY_TILE, TILE

COLUMNS = math.lcm(TILE, TERNARY_TILE)
"""Where a piece of columns may begin: where tiles of both lengths do."""

PIECE_BYTES = 8 << 20
"""Of unpacked weights that torch multiplies at a time: what a core's share of cache holds."""


class Part(ctypes.Structure):
    """`Part` of sources/product/weight.h."""

    _fields_ = [
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64)
          for name in ("first_row", "last_row", "first_column", "last_column")),
        ("kind", ctypes.c_int32),
    ]  # fmt: skip


def values(
    ready: Prepared, dtype: torch.dtype, rows: slice | None = None, columns: slice | None = None,
    reuse: bool = False,
) -> Tensor:  # fmt: skip
    """Part of W [n, k], in original row order and stored coordinates; `ready` for `VALUES`.

    `columns` begin at a multiple of COLUMNS. With `reuse` the result lies in memory that this
    thread's next call overwrites.
    """
    weight = ready.weight
    rows, columns = rows or slice(0, weight.n), columns or slice(0, weight.k)
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    out = _scratch(shape, dtype) if reuse else torch.empty(shape, dtype=dtype)
    part = Part(out.data_ptr(), rows.start, rows.stop, columns.start, columns.stop, KINDS[dtype])
    ready.kernel.lowra_values(ready.address, ctypes.addressof(part), torch.get_num_threads())
    return out


_memory = threading.local()


def _scratch(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory kept per thread: fresh pages cost more than what is written to them."""
    size_bytes = shape[0] * shape[1] * dtype.itemsize
    held: Tensor | None = getattr(_memory, "held", None)
    if held is None or held.numel() < size_bytes:
        held = _memory.held = torch.empty(size_bytes, dtype=torch.uint8)
    return held[:size_bytes].view(dtype).view(shape)


def pieces(total: int, other: int, unit: int, dtype: torch.dtype) -> list[slice]:
    """`total` rows or columns cut so that a piece with `other` of the other fits a cache."""
    step = max(unit, PIECE_BYTES // (other * dtype.itemsize) // unit * unit)
    return [slice(start, min(total, start + step)) for start in range(0, total, step)]


def forward_by_pieces(x: Tensor, ready: Prepared, bias: Tensor | None) -> Tensor:
    """y [..., n] of many tokens: rows are unpacked into cache, and torch multiplies."""
    n, k = ready.weight.n, ready.weight.k
    dtype = product_dtype(x)
    turned = turned_input(x, ready).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    cut = pieces(n, k, 64, dtype)
    if len(cut) == 1:
        y = functional.linear(turned, values(ready, dtype, reuse=True), bias)
        return y.to(x.dtype).view(*x.shape[:-1], n)
    y = x.new_empty((turned.shape[0], n))
    for rows in cut:
        part = values(ready, dtype, rows=rows, reuse=True)
        y[:, rows] = functional.linear(turned, part, None if bias is None else bias[rows])
    return y.view(*x.shape[:-1], n)


def backward_by_pieces(grad: Tensor, ready: Prepared) -> Tensor:
    """dL/dx [..., k] = dL/dy W, a few columns of W at a time."""
    n, k = ready.weight.n, ready.weight.k
    dtype = product_dtype(grad)
    given = grad.reshape(-1, n).to(dtype)
    cut = pieces(k, n, COLUMNS, dtype)
    if len(cut) == 1:
        out = given @ values(ready, dtype, reuse=True)
    else:
        out = given.new_empty((given.shape[0], k))
        for columns in cut:
            out[:, columns] = given @ values(ready, dtype, columns=columns, reuse=True)
    if ready.weight.block > 1:
        out = turn(out, ready, back=True)
    return out.to(grad.dtype).view(*grad.shape[:-1], k)


def turn(x: Tensor, ready: Prepared, back: bool) -> Tensor:
    """x [m, k] rotated as inputs are, or `back`: in float32, then in the dtype of x."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    ready.kernel.lowra_turn(
        ready.address, x.data_ptr(), x.stride(0), out.data_ptr(), x.shape[0],
        KINDS[x.dtype], back, torch.get_num_threads(),
    )  # fmt: skip
    return out


def turned_input(x: Tensor, ready: Prepared) -> Tensor:
    """x [..., k] as rows [m, k] in the coordinates that the weight is stored in.

    The last result is kept for as long as its x lives unchanged: query, key and value, or gate and
    up, read one input.
    """
    k, block = ready.weight.k, ready.weight.block
    if block == 1:
        return x.reshape(-1, k)
    inference = x.is_inference()
    place = (x.data_ptr(), x.shape, 0 if inference else x._version, ready.rotation)
    last = getattr(_memory, "turned", None)
    if last is not None and not inference and last[0]() is x and last[1] == place:
        return last[2]
    turned = turn(x.reshape(-1, k), ready, back=False)
    held = _memory.__dict__
    held["turned"] = (weakref.ref(x, lambda _: held.pop("turned", None)), place, turned)
    return turned
