"""KL(original || model) of next-token logits, a few positions at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 32
"""Positions at a time: six float32 rows of the vocabulary each, 38 MB at 49152 entries."""


class _Divergence(torch.autograd.Function):
    """Forward computes the gradient along, where one is wanted: the logits are the largest tensors
    there are."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, logits.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            found = logits[part].float().log_softmax(-1)
            likely = wanted[part].float().log_softmax(-1)
            chance = likely.exp()
            total += (chance * (likely - found)).sum(dtype=torch.float64)
            if grad is not None:
                grad[part] = ((found.exp_() - chance) / logits.shape[0]).to(logits.dtype)
        ctx.save_for_backward(grad)
        return (total / logits.shape[0]).float()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(grads[0]), None


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over positions of KL in nats, differentiable in `logits`; both [..., vocab]."""
    size = logits.shape[-1]
    return _Divergence.apply(logits.reshape(-1, size), wanted.reshape(-1, size))  # pyright: ignore
