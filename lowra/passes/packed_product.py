"""The product with a packed weight in training: codes fixed, gradients for codebooks and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowra.compiler.storage import PackedWeight
from lowra.passes.feedback import scale_index
from lowra.passes.latents import level_grads, look_up
from lowra.passes.panels import Panel, rotated_values, take_apart


class _PackedProduct(torch.autograd.Function):
    """x [..., k] -> x W', with W' [n, k] unpacked for the product and once more for its gradient.

    Where its tables are trained, the gradient of W', one site's at a time, is reduced to theirs at
    once: no weight and no gradient of its size outlives the call.
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
        dense = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return back, *table_grads(ctx.packed, dense.float()), None


def packed_product(
    x: Tensor, codebooks: Tensor, scales: Tensor | None, packed: PackedWeight
) -> Tensor:
    """[..., n] of rotated x [..., k]. `packed` holds the tables as they are stored; gradients pass
    the rounding on to the flat `codebooks` and `scales` as if it were not there."""
    return _PackedProduct.apply(x, codebooks, scales, packed)  # pyright: ignore


def table_grads(packed: PackedWeight, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weight's codebooks and scales, float32 and flat as stored, from that of its
    values in rotated coordinates, float32 [n, k]."""
    pairs = [_panel_grads(panel, packed, grad[panel.index]) for panel in take_apart(packed)]
    levels = torch.cat([of_levels.reshape(-1) for of_levels, _ in pairs])
    scales = [of_scales.reshape(-1) for _, of_scales in pairs if of_scales is not None]
    return levels, torch.cat(scales) if scales else None


def _panel_grads(panel: Panel, packed: PackedWeight, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    if panel.scales is None:
        return level_grads(panel.codes, grad, panel.levels.shape), None
    rows, groups = panel.scales.shape
    factors = panel.scales
    if groups > 1:
        factors = factors[:, scale_index(packed.k, packed.group)]
    levels = level_grads(panel.codes, grad * factors, panel.levels.shape)
    products = look_up(panel.codes, panel.levels).mul_(grad)
    if groups == 1:
        return levels, products.sum(1)
    padded = functional.pad(products, (0, groups * packed.group - packed.k))
    return levels, padded.view(rows, groups, packed.group).sum(2)
