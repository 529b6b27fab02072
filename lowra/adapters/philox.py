"""Random matrices that a file names by seed: the same on every machine and version.

The numbers are those of Philox4x64-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3,
SC 2011), a function of key and counter; torch's own depend on device and version, so that PEFT
stores VeRA's projections rather than their seed.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

PRNG = "philox4x64-10"
"""What an adapter's file calls it."""


def uniform(seed: int, index: int, shape: tuple[int, ...]) -> Tensor:
    """float32 in [-1, 1), by steps of 2^-23: matrix `index` of `seed`.

    Key (seed, 0), counters (1, 0, 0, index), (2, 0, 0, index) and on, lowest word first. Each
    64-bit word gives two numbers, the upper 24 bits of its low half and then of its high half, as
    u / 2^23 - 1.
    """
    count = math.prod(shape)
    bits = np.random.Philox(key=seed, counter=np.array([0, 0, 0, index], dtype=np.uint64))
    words = bits.random_raw(-(-count // 2)).astype("<u8").view("<u4")[:count]
    values = (words >> 8).astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return torch.from_numpy(values).view(shape)


class _Combination(torch.autograd.Function):
    """sum over i of c_i U_i, for matrices U_i that are made anew, forward and backward."""

    @staticmethod
    def forward(ctx: object, coefficients: Tensor, seed: int, shape: tuple[int, ...]) -> Tensor:
        ctx.seed, ctx.count = seed, len(coefficients)  # type: ignore[attr-defined]
        total = torch.zeros(shape, dtype=torch.float64)
        for index, weight in enumerate(coefficients.tolist()):
            if weight:
                total.add_(uniform(seed, index, shape).double(), alpha=weight)
        return total.to(coefficients.device, coefficients.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        count, seed = ctx.count, ctx.seed  # type: ignore[attr-defined]
        flat = grad.detach().cpu().float()
        found = [(flat * uniform(seed, index, tuple(flat.shape))).sum() for index in range(count)]
        return torch.stack(found).to(grad.device, grad.dtype), None, None


def combination(coefficients: Tensor, seed: int, shape: tuple[int, ...]) -> Tensor:
    """sum over i of c_i U_i with U_i = uniform(seed, i, shape), differentiable in c [count]."""
    found = _Combination.apply(coefficients, seed, shape)
    assert isinstance(found, Tensor)
    return found
