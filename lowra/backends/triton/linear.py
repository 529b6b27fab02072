"""Kernels of the ops that a compressed model runs on, for CUDA and ROCm devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowra.backends.activations import get_activations
from lowra.backends.reference import linear as reference
from lowra.backends.triton import integer, launch
from lowra.backends.triton.keys import TERNARY_ID
from lowra.backends.triton.schedule import (
    FEW_TOKENS,
    MOST_FUSED_RANK,
    MOST_SHRUNK_RANK,
    UNPACKED,
    Choice,
)
from lowra.backends.triton.service import (
    KernelError,
    explain,
    replace_from_now,
    served,
    target_of,
)
from lowra.backends.triton.targets import Target
from lowra.backends.triton.tuning import choice_for
from lowra.backends.triton.weight import Weight, taken
from lowra.compiler.ops import DIRECT, LIBRARY
from lowra.compiler.packing import TERNARY_TILE, TILE
from lowra.compiler.rotation import Rotation

COLUMNS = math.lcm(TILE, TERNARY_TILE)
PIECE_BYTES = 16 << 20
"""Of an unpacked weight that torch multiplies at a time, in `input_gradient`, so that it may stay
in the second cache; more where a tile of columns is more. Not measured."""

_unpacked: dict[str, Callable[..., Tensor]] = reference.kernels(reference.stored_rows)


def ready(packed: tuple[Any, ...], dtype: torch.dtype, target: Target | None) -> Weight | None:
    """The weight as kernels take it; None, with the reason said once, where they do not."""
    if target is None:
        return None
    found = taken(packed, dtype)
    return explain(found) if isinstance(found, str) else found


def forward(
    x: Tensor, packed: tuple[Any, ...], bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None, target: Target | None = None,
) -> Tensor:  # fmt: skip
    """Both linear ops."""
    target = target or target_of(x.device)
    weight = ready(packed, x.dtype, target) if x.shape[-1] == packed[5] else None

    def reference() -> Tensor:
        if factors is None:
            return _unpacked["quantized_linear"](x, *packed, bias)
        return _unpacked["quantized_linear_lora"](x, *packed, bias, *factors)

    if weight is None or target is None:
        return reference()
    return served(lambda: product(x, packed, weight, target, bias, factors), reference)


def product(
    x: Tensor, packed: tuple[Any, ...], weight: Weight, target: Target, bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None, choice: Choice | None = None,
) -> Tensor:  # fmt: skip
    """y = x W' + bias + scaling (x A') B' by the kernels: as `choice` says; or the best way known,
    and from an unpacked W where its kernel fails. Where the user allows integers, few tokens are
    read as such."""
    rows = x.reshape(-1, weight.k).contiguous()
    turned = launch.rotated(rows, Rotation(*packed[7:9]), target)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    if choice is not None:
        y = _by_choice(choice, rows, turned, weight, target, bias, factors)
        return y.view(*x.shape[:-1], weight.n)
    y = _in_integers(rows, turned, weight, target, bias, factors)
    if y is not None:
        return y.view(*x.shape[:-1], weight.n)
    rank = 0 if factors is None else factors[0].shape[0]
    best = choice_for(weight, rows.shape[0], x.dtype, rank, target, x.device)
    try:
        y = _by_choice(best, rows, turned, weight, target, bias, factors)
    except KernelError as error:
        if best == UNPACKED:
            raise
        replace_from_now(error)
        y = _by_choice(UNPACKED, rows, turned, weight, target, bias, factors)
    return y.view(*x.shape[:-1], weight.n)


def _in_integers(
    rows: Tensor, turned: Tensor, weight: Weight, target: Target, bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None,
) -> Tensor | None:  # fmt: skip
    """The product where x may be read as integers and a kernel does; else None."""
    kind = get_activations("cuda") if rows.dtype != torch.float32 else "float32"
    if not kind.startswith("int"):
        return None
    rank, fine = 0 if factors is None else factors[0].shape[0], kind == "int16"
    takes = integer.takes(weight.key, weight.k, rows.shape[0], target)
    if not takes or rank > MOST_FUSED_RANK:
        return None
    m, dtype = rows.shape[0], rows.dtype
    try:
        of = "" if factors is None else launch.dtype_of_b(dtype, factors)
        given = (weight, m, dtype, fine, target, rank, of, bias is not None, rows.device)
        plan = integer.planned(*given)
        made, _ = _factors(rows, factors, target)
        return integer.product(turned, weight, plan, bias, made)
    except KernelError as error:
        replace_from_now(error)
        return None


def _by_choice(
    choice: Choice, rows: Tensor, turned: Tensor, weight: Weight, target: Target,
    bias: Tensor | None, factors: tuple[Tensor, Tensor, float] | None,
) -> Tensor:  # fmt: skip
    if choice != UNPACKED and (factors is None or factors[0].shape[0] <= MOST_FUSED_RANK):
        made = _factors(rows, factors, target)
        return launch.product(turned, weight, target, bias, *made, choice=choice)
    if choice == UNPACKED:
        unpacked_ = launch.values(weight, rows.dtype, target)
        with launch.noted("a product", (rows.shape[0], weight.n), rows.dtype):
            y = functional.linear(turned, unpacked_, bias)
    else:
        y = launch.product(turned, weight, target, bias, choice=choice)
    if factors is not None:
        a, b, scaling = factors
        y.addmm_(functional.linear(rows, a.to(y.dtype)), b.to(y.dtype).T, alpha=scaling)
    return y


def _factors(
    x: Tensor, factors: tuple[Tensor, Tensor, float] | None, target: Target
) -> tuple[tuple[Tensor, Tensor, float] | None, bool]:
    """(h = x A', B, scaling), and whether h may still be in the making."""
    if factors is None or factors[0].shape[0] == 0 or not x.numel():
        return None, False
    a, b, scaling = factors
    of_few = x.shape[0] <= FEW_TOKENS
    b = (b if of_few and launch.reads_factor(b.dtype, target) else b.to(x.dtype)).contiguous()
    few = of_few and a.shape[0] <= MOST_SHRUNK_RANK and a.dtype in launch.NAMES
    if few:
        return (launch.shrink(x, a.contiguous(), target), b, scaling), True
    return (functional.linear(x, a.to(x.dtype)), b, scaling), False


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


def dequantize(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, seed: int, block: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W [n, k]; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    return unpacked(packed, dtype, target_of(codes.device))


def unpacked(packed: tuple[Any, ...], dtype: torch.dtype, target: Target | None) -> Tensor:
    """W [n, k] in `dtype`, rows put back and the input rotation undone in float32."""
    rotation = Rotation(*packed[7:9])
    weight = ready(packed, dtype, target)
    if weight is None or target is None:
        return _unpacked["dequantize"](*packed, dtype)

    def kernels() -> Tensor:
        stored = launch.values(weight, torch.float32 if rotation.active else dtype, target)
        return launch.rotated(stored, rotation, target, back=True).to(dtype)

    return served(kernels, lambda: _unpacked["dequantize"](*packed, dtype))


def input_gradient(
    grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int, seed: int, block: int,
) -> Tensor:  # fmt: skip
    """dL/dx = dL/dy W; see the reference."""
    packed = (codes, codebooks, scales, order, panels, k, group, seed, block)
    return backward(grad, packed, target_of(grad.device))


def backward(grad: Tensor, packed: tuple[Any, ...], target: Target | None) -> Tensor:
    """dL/dx [..., k], by pieces of W of some PIECE_BYTES that torch multiplies."""
    weight = ready(packed, grad.dtype, target)

    def reference() -> Tensor:
        return _unpacked["input_gradient"](grad, *packed)

    if weight is None or target is None:
        return reference()
    return served(lambda: _by_pieces(grad, packed, weight, target), reference)


def _by_pieces(grad: Tensor, packed: tuple[Any, ...], weight: Weight, target: Target) -> Tensor:
    rows = grad.reshape(-1, weight.n)
    out = launch.room("a gradient", (rows.shape[0], weight.k), grad.dtype, grad.device)
    fit = PIECE_BYTES // (max(1, weight.n) * grad.dtype.itemsize)
    # Tiles of all widths begin together where a piece does.
    whole = COLUMNS if TERNARY_ID in weight.panels[0::2] else TILE
    step = max(whole, fit // whole * whole)
    for start in range(0, weight.k, step):
        columns = slice(start, min(weight.k, start + step))
        piece = launch.values(weight, grad.dtype, target, columns)
        with launch.noted("a piece of a gradient", (rows.shape[0], piece.shape[1]), grad.dtype):
            out[:, columns] = rows @ piece
    turned = launch.rotated(out, Rotation(*packed[7:9]), target, back=True)
    return turned.view(*grad.shape[:-1], weight.k)


_kernels = (quantized_linear, quantized_linear_lora, dequantize, input_gradient)
DIRECT["cuda"] = forward
for _kernel in _kernels:
    torch.library.impl(f"lowra::{_kernel.__name__}", "CUDA", _kernel, lib=LIBRARY)
