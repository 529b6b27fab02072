"""The product with a packed weight in training: codes fixed, gradients for codebooks and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowra.compiler.storage import UNROTATED, PackedWeight
from lowra.passes.rounding.panels import rotated_values


class _PackedProduct(torch.autograd.Function):
    """x [..., k] -> x W', with W' [n, k] unpacked for the product and once more for its gradient.

    No weight, and no gradient of its size, outlives the call.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebooks: Tensor, scales: Tensor | None, packed: PackedWeight
    ) -> Tensor:
        ctx.packed = packed
        ctx.save_for_backward(*((x,) if ctx.needs_input_grad[1] else ()))
        return functional.linear(x, rotated_values(packed, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        grad: Tensor = grads[0]
        back = None
        if ctx.needs_input_grad[0]:
            back = grad @ rotated_values(ctx.packed, grad.dtype)
        if not ctx.needs_input_grad[1]:
            return back, None, None, None
        (x,) = ctx.saved_tensors
        *packed, _seed, _block = ctx.packed.op_args()
        turned = (*packed, UNROTATED.seed, UNROTATED.block)  # as x is
        levels, scales = torch.ops.lowra.table_gradients(
            grad.flatten(0, -2), x.flatten(0, -2), *turned
        )
        return back, levels, None if ctx.packed.scales is None else scales, None


def packed_product(
    x: Tensor, codebooks: Tensor, scales: Tensor | None, packed: PackedWeight
) -> Tensor:
    """[..., n] of rotated x [..., k]. `packed` holds the tables as they are stored; gradients pass
    the rounding on to the flat `codebooks` and `scales` as if it were not there."""
    return _PackedProduct.apply(x, codebooks, scales, packed)  # pyright: ignore
