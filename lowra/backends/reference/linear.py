"""Plain-torch meaning of the `lowra::` ops.

Arithmetic on tables runs in float32 (float64 where the caller works in float64); the product runs
in the dtype of x, after the input rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from lowra.compiler.ops import LIBRARY
from lowra.compiler.packing import levels_of, row_words, unpack_rows
from lowra.compiler.rotation import Rotation, rotate, unrotate
from lowra.compiler.storage import ROW_SCALES, scale_groups


def _panels(codes: Tensor, codebooks: Tensor, panels: list[int], k: int) -> Iterator[tuple]:
    """(first row, rows, levels, codes int32 [rows, k], slice of its tables, shared) per panel."""
    shared = codebooks.numel() == sum(levels_of(id) for id in panels[0::2])
    word, row, value = 0, 0, 0
    for id, rows in zip(panels[0::2], panels[1::2], strict=True):
        words = rows * row_words(k, id)
        values = (1 if shared else rows) * levels_of(id)
        fields = unpack_rows(codes[word : word + words], rows, k, id)
        yield row, rows, levels_of(id), fields, slice(value, value + values), shared
        word, row, value = word + words, row + rows, value + values


def _look_up(fields: Tensor, table: Tensor, levels: int, shared: bool) -> Tensor:
    """table[code] per element: one table for all rows, or one per row."""
    if shared:
        return table.index_select(0, fields.reshape(-1)).view(fields.shape)
    return table.view(-1, levels).gather(1, fields.long())


def scale_columns(scales: Tensor, k: int, group: int) -> Tensor:
    """scales [rows, groups] as a factor that broadcasts against [rows, k]."""
    if group == ROW_SCALES:
        return scales
    return scales.repeat_interleave(group, dim=1)[:, :k]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def stored_rows(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W [n, k] in original row order, in the rotated input coordinates it is stored in."""
    working = working_dtype(dtype)
    tables = codebooks.to(working)
    factors = None if scales is None else scales.to(working).view(order.shape[0], -1)
    weight = torch.empty(order.shape[0], k, dtype=dtype, device=codes.device)
    index = order.long()
    for row, rows, levels, fields, where, shared in _panels(codes, codebooks, panels, k):
        values = _look_up(fields, tables[where], levels, shared)
        if factors is not None:
            values = values * scale_columns(factors[row : row + rows], k, group)
        weight[index[row : row + rows]] = values.to(dtype)
    return weight


def dequantize_backward(
    grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, seed: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dL/dcodebooks and dL/dscales from dL/dW [n, k].

    With G the gradient in stored coordinates: dL/dc_j = sum of s G over weights of code j, and
    dL/ds_g = sum of c[code] G over the weights of group g.
    """
    turned = rotate(grad.to(working_dtype(grad.dtype)), Rotation(seed, block))
    return _of_tables(turned, codes, codebooks, scales, order, panels, k, group)


def table_gradients(
    grad: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None,
    order: Tensor, panels: list[int], k: int, group: int, seed: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dL/dcodebooks and dL/dscales of y = x W' from dL/dy [m, n] and x [m, k].

    dL/dW = dL/dy' x is that of the rotated inputs where the weight is stored for them.
    """
    working = working_dtype(grad.dtype)
    turned = rotate(x.to(working), Rotation(seed, block))
    return _of_tables(
        grad.to(working).T @ turned, codes, codebooks, scales, order, panels, k, group
    )


def _of_tables(
    grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of codebooks and scales from that of W [n, k] in stored coordinates."""
    working = grad.dtype
    stored = grad[order.long()]
    tables = codebooks.to(working)
    groups = scale_groups(k, group)
    factors = None if scales is None else scales.to(working).view(-1, groups)
    grad_tables = torch.zeros_like(tables)
    grad_factors = torch.zeros(order.shape[0], groups, dtype=working, device=grad.device)
    for row, rows, levels, fields, where, shared in _panels(codes, codebooks, panels, k):
        g = stored[row : row + rows]
        if factors is not None:
            products = g * _look_up(fields, tables[where], levels, shared)
            columns = torch.arange(k, device=g.device) // (k if group == ROW_SCALES else group)
            grad_factors[row : row + rows].index_add_(1, columns, products)
            g = g * scale_columns(factors[row : row + rows], k, group)
        offset = 0 if shared else levels * torch.arange(rows, device=g.device).view(-1, 1)
        grad_tables[where].index_add_(0, (fields + offset).reshape(-1), g.reshape(-1))
    return grad_tables, grad_factors.reshape(-1)


Rows = Callable[..., Tensor]
"""`stored_rows`, or what does the same faster."""


def kernels(stored_rows: Rows) -> dict[str, Callable[..., Tensor]]:
    """The ops that need a weight's values, by name, on top of what unpacks them."""

    def dequantize(
        codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
        panels: list[int], k: int, group: int, seed: int, block: int, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """W [n, k]: table values times scales, rows put back, input rotation undone."""
        rotation = Rotation(seed, block)
        stored = working_dtype(dtype) if rotation.active else dtype
        weight = stored_rows(codes, codebooks, scales, order, panels, k, group, stored)
        return unrotate(weight, rotation).to(dtype)

    def quantized_linear(
        x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
        panels: list[int], k: int, group: int, seed: int, block: int, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """y = x W' + bias for x [..., k] in float16, bfloat16, float32 or float64."""
        rotation = Rotation(seed, block)
        weight = stored_rows(codes, codebooks, scales, order, panels, k, group, x.dtype)
        rotated = rotate(x.to(working_dtype(x.dtype)), rotation).to(x.dtype)
        return functional.linear(rotated, weight, None if bias is None else bias.to(x.dtype))

    def quantized_linear_lora(
        x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
        panels: list[int], k: int, group: int, seed: int, block: int, bias: Tensor | None,
        lora_a: Tensor, lora_b: Tensor, scaling: float,
    ) -> Tensor:  # fmt: skip
        """y = x W' + bias + scaling (x A') B', the adapter in the original input coordinates."""
        packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
        hidden = functional.linear(x, lora_a.to(x.dtype))
        y = quantized_linear(x, *packed, bias)
        return y + functional.linear(hidden, lora_b.to(x.dtype)) * scaling

    def input_gradient(
        grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
        panels: list[int], k: int, group: int, seed: int, block: int,
    ) -> Tensor:  # fmt: skip
        """dL/dx = dL/dy W. The rotation is undone on the product, which is smaller than W where
        tokens are fewer than rows."""
        weight = stored_rows(codes, codebooks, scales, order, panels, k, group, grad.dtype)
        turned = (grad @ weight).to(working_dtype(grad.dtype))
        return unrotate(turned, Rotation(seed, block)).to(grad.dtype)

    ops = (dequantize, quantized_linear, quantized_linear_lora, input_gradient)
    return {op.__name__: op for op in ops}


_kernels = {
    **kernels(stored_rows), "dequantize_backward": dequantize_backward,
    "table_gradients": table_gradients,
}  # fmt: skip
for _name, _kernel in _kernels.items():
    torch.library.impl(f"lowra::{_name}", "CompositeExplicitAutograd", _kernel, lib=LIBRARY)
