"""GPTQ (arXiv 2210.17323) on factors, and the error feedback that others build on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.adapters.baselines.compressed import GROUP, HALF, Compressed
from lowra.adapters.factors import LowRank
from lowra.adapters.group_rtn import codes_of, grid_of
from lowra.compiler.grids import in_half

Column = Callable[[int, Tensor], Tensor]
"""Place within a block and a column [rows] -> the column as it is stored."""

Fit = Callable[[Tensor, Tensor], tuple[Column, float]]
"""A block [rows, columns] and the diagonal of the inverse Hessian's root [columns] -> how its
columns are stored, and the bits of the block."""

DAMPING = 0.1
"""Of the mean of the diagonal; what LoRAQuant's code takes."""


def gptq(adapters: Sequence[LowRank], grams: Mapping[str, Tensor], bits: int) -> Compressed:
    """`bits` per value, asymmetric, a scale and a zero point per 128 columns of a row."""

    def fit(block: Tensor, _root: Tensor) -> tuple[Column, float]:
        scale, zero = grid_of(block, bits)
        scale = in_half(scale)

        def column(_: int, values: Tensor) -> Tensor:
            wide = values[:, None]
            return ((codes_of(wide, scale, zero, bits) - zero) * scale)[:, 0]

        return column, block.numel() * bits + len(block) * (HALF + bits)

    return by_feedback(adapters, grams, fit)


def by_feedback(adapters: Sequence[LowRank], grams: Mapping[str, Tensor], fit: Fit) -> Compressed:
    """Both factors by error feedback: A for its inputs, B for what the stored A makes of them."""
    factors, total = {}, 0.0
    for one in adapters:
        gram = grams[one.name].double()
        a, a_bits = feedback(one.a.float(), gram, fit)
        b, b_bits = feedback(one.b.float(), a.double() @ gram @ a.double().T, fit)
        factors[one.name] = (a, b)
        total += a_bits + b_bits
    return Compressed(factors, total)


def feedback(rows: Tensor, gram: Tensor, fit: Fit) -> tuple[Tensor, float]:
    """Rows [n, k] stored column by column; what a column loses is made up for by those after it.

    With H = X'X + damping and H^-1 = U'U (U upper): column j leaves e = (w_j - q_j) / U_jj, and
    columns after it lose e U_j (GPTQ, section 3.3). Gives the stored rows and all bits.
    """
    left, stored, bits = rows.clone(), torch.zeros_like(rows), 0.0
    root = inverse_root(gram).float()
    for first in range(0, rows.shape[1], GROUP):
        last = min(first + GROUP, rows.shape[1])
        column, block_bits = fit(left[:, first:last].clone(), root.diagonal()[first:last])
        bits += block_bits
        for j in range(first, last):
            stored[:, j] = column(j - first, left[:, j])
            error = (left[:, j] - stored[:, j]) / root[j, j]
            left[:, j:] -= torch.outer(error, root[j, j:])
    return stored, bits


def inverse_root(gram: Tensor) -> Tensor:
    """U, upper triangular, with U'U = (gram + damping)^-1, float64; inputs that are always zero
    count as one."""
    damped = gram.double().clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
