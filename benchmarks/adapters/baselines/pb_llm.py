"""PB-LLM (arXiv 2310.00034): a tenth of the values in 8 bits, the others as signs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.adapters.baselines.compressed import HALF, Compressed
from benchmarks.adapters.baselines.gptq import Column, by_feedback
from lowra.adapters.factors import LowRank
from lowra.adapters.group_rtn import codes_of, grid_of
from lowra.compiler.grids import in_half

SALIENT, SALIENT_BITS = 0.1, 8


def pb_llm(adapters: Sequence[LowRank], grams: Mapping[str, Tensor]) -> Compressed:
    """By error feedback. Salient are those of a block with the largest w^2 / U_jj^2 (its Hessian
    criterion). Stored: a map of one bit per value, 8 bits or a sign, and per row of a block a scale
    of the signs, a scale and a zero point of the salient ones."""
    return by_feedback(adapters, grams, fit)


def fit(block: Tensor, root: Tensor) -> tuple[Column, float]:
    salient = most_salient(block, root)
    low = torch.where(salient, 0, block)
    size = in_half(low.abs().sum(1) / (~salient).sum(1).clamp_min(1))
    scale, zero = grid_of(torch.where(salient, block, 0), SALIENT_BITS)
    scale = in_half(scale)

    def column(j: int, values: Tensor) -> Tensor:
        wide = values[:, None]
        high = ((codes_of(wide, scale, zero, SALIENT_BITS) - zero) * scale)[:, 0]
        return torch.where(salient[:, j], high, torch.where(values < 0, -size, size))

    many = int(salient.sum())
    bits = block.numel() + many * SALIENT_BITS + (block.numel() - many)
    return column, bits + len(block) * (2 * HALF + SALIENT_BITS)


def most_salient(block: Tensor, root: Tensor) -> Tensor:
    """bool [rows, columns]: the tenth with the largest w^2 / U_jj^2."""
    score = block.square() / root.square()
    count = max(1, round(SALIENT * block.numel()))
    return score >= score.flatten().kthvalue(block.numel() - count + 1).values
