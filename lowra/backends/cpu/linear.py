"""Kernels of the ops that a compressed model runs on, and which of them serves a call."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowra.backends.cpu.activations import activations_for
from lowra.backends.cpu.emit import VALUES
from lowra.backends.cpu.pieces import backward_by_pieces, forward_by_pieces, values
from lowra.backends.cpu.product import (
    KINDS,
    Prepared,
    check_sizes,
    prepared,
    product,
)
from lowra.backends.cpu.tiers import best_tier
from lowra.backends.reference import linear
from lowra.compiler.half_products import product_dtype
from lowra.compiler.ops import DIRECT, LIBRARY


def stored_rows(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W [n, k] in original row order and stored coordinates; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, 0, 1)
    ready = None if dtype == torch.float64 else prepared(packed, VALUES)
    if ready is not None:
        return values(ready, dtype)
    check_sizes(codes, codebooks, scales, order, panels, k, group)
    return linear.stored_rows(codes, codebooks, scales, order, panels, k, group, dtype)


FEW_TOKENS = {"avx512": 64, "avx2": 16, "": 8}
"""By a tier's vectors: with more tokens, unpacking rows for torch's product costs less."""

ANY_TOKENS = "avx512"
"""Vectors with which rows are multiplied in bytes or halves as fast as torch multiplies."""

SHORT_ROW = 2048
"""Columns below which, with more than `SOME_TOKENS`, preparing tokens costs more than unpacking,
unless they become bytes."""

SOME_TOKENS = 128


def most_tokens(ready: Prepared, k: int, activations: str) -> int:
    """With more tokens than these, torch multiplies."""
    vectors = best_tier().vectors
    if ready.looked_up and vectors == ANY_TOKENS:
        return SOME_TOKENS if k < SHORT_ROW and activations != "int8" else sys.maxsize
    return FEW_TOKENS[vectors]


_unpacked = linear.kernels(stored_rows)


def quantized_linear(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, seed: int, block: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """y = x W' + bias; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    return forward(x, packed, bias, None)


def quantized_linear_lora(
    x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, seed: int, block: int, bias: Tensor | None,
    lora_a: Tensor, lora_b: Tensor, scaling: float,
) -> Tensor:  # fmt: skip
    """y = x W' + bias + scaling (x A') B'; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    return forward(x, packed, bias, (lora_a, lora_b, scaling))


def forward(
    x: Tensor, packed: tuple[Any, ...], bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None,
) -> Tensor:  # fmt: skip
    """Both linear ops, by the number of tokens."""
    k = packed[5]
    if x.dtype in KINDS and x.shape[-1] == k:
        activations = activations_for(x.dtype, k)
        ready = prepared(packed, activations)
        if ready is not None and x.numel() <= k * most_tokens(ready, k, activations):
            return product(x, ready, bias, factors)
        ready = prepared(packed, VALUES)
        if ready is not None:
            y = forward_by_pieces(x, ready, bias)
            return y if factors is None else add_factors(y, x, *factors)
    if factors is None:
        return _unpacked["quantized_linear"](x, *packed, bias)
    return _unpacked["quantized_linear_lora"](x, *packed, bias, *factors)


def add_factors(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """y + scaling (x A') B', in place."""
    dtype = product_dtype(x)
    hidden = functional.linear(x.reshape(-1, x.shape[-1]).to(dtype), a.to(dtype))
    rows = y.view(-1, y.shape[-1])
    if dtype == y.dtype:
        rows.addmm_(hidden, b.to(dtype).T, alpha=scaling)
    else:
        rows += scaling * functional.linear(hidden, b.to(dtype))
    return y


def input_gradient(
    grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, seed: int, block: int,
) -> Tensor:  # fmt: skip
    """dL/dx = dL/dy W; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    ready = prepared(packed, VALUES) if grad.dtype in KINDS else None
    if ready is None:
        return _unpacked["input_gradient"](grad, *packed)
    return backward_by_pieces(grad, ready)


_kernels = {
    **_unpacked, "quantized_linear": quantized_linear,
    "quantized_linear_lora": quantized_linear_lora, "input_gradient": input_gradient,
}  # fmt: skip
DIRECT["cpu"] = forward
for _name, _kernel in _kernels.items():
    torch.library.impl(f"lowra::{_name}", "CPU", _kernel, lib=LIBRARY)
