"""BiLLM (arXiv 2402.04291): signs of two sizes, and of what they leave in salient columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.adapters.baselines.compressed import HALF, Compressed
from benchmarks.adapters.baselines.gptq import Column, by_feedback
from lowra.adapters.factors import LowRank
from lowra.compiler.grids import in_half

MOST_SALIENT = 0.25
"""Of a block's columns: up to here the search for their number goes."""

SHARES = torch.arange(1, 10) / 10
"""Of the largest size in a block, where the break between small and large is tried."""


def billm(adapters: Sequence[LowRank], grams: Mapping[str, Tensor]) -> Compressed:
    """By error feedback. Stored: a sign per value, a second one in salient columns, elsewhere a bit
    that tells small from large (the paper leaves that one out of its count), a bit per column and
    four scales per row of a block."""
    return by_feedback(adapters, grams, fit)


def fit(block: Tensor, root: Tensor) -> tuple[Column, float]:
    columns = block.shape[1]
    score = (block.square() / root.square()).sum(0)
    order = score.argsort(descending=True, stable=True)
    counts = sorted({0, *(2**i for i in range(8) if 2**i <= MOST_SALIENT * columns)})
    salient = min(
        (torch.zeros(columns, dtype=torch.bool).index_fill(0, order[:count], True)
         for count in counts),
        key=lambda chosen: _error(block, chosen),
    )  # fmt: skip
    first, second = residual_sizes(block[:, salient])
    limit = best_break(block[:, ~salient])
    small, large = bell_sizes(block[:, ~salient], limit)

    def column(j: int, values: Tensor) -> Tensor:
        if salient[j]:
            once = _signed(values, first)
            return once + _signed(values - once, second)
        return _signed(values, torch.where(values.abs() > limit, large, small))

    many = int(salient.sum()) * len(block)
    bits = 2 * many + 2 * (block.numel() - many) + columns
    return column, bits + len(block) * 4 * HALF


def residual_sizes(block: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes [rows] of signs, and of the signs of what these leave (the paper's section 3.2)."""
    if not block.numel():
        return torch.zeros(len(block)), torch.zeros(len(block))
    first = in_half(block.abs().mean(1))
    rest = block - _signed(block, first[:, None])
    return first, in_half(rest.abs().mean(1))


def bell_sizes(block: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Mean sizes [rows] of the values up to `limit`, and of those above (section 3.3)."""
    size = block.abs()
    large = size > limit
    return tuple(
        in_half(torch.where(mask, size, 0).sum(1) / mask.sum(1).clamp_min(1))
        for mask in (~large, large)
    )  # pyright: ignore[reportReturnType]


def best_break(block: Tensor) -> float:
    """Where small ends and large begins, with the least squared error."""
    if not block.numel():
        return 0.0
    tried = (block.abs().max() * SHARES).tolist()
    return min(tried, key=lambda limit: _bell_error(block, limit))


def _bell_error(block: Tensor, limit: float) -> float:
    small, large = bell_sizes(block, limit)
    size = torch.where(block.abs() > limit, large[:, None], small[:, None])
    return float((block.abs() - size).square().sum())


def _error(block: Tensor, salient: Tensor) -> float:
    high, low = block[:, salient], block[:, ~salient]
    first, second = residual_sizes(high)
    rest = high - _signed(high, first[:, None])
    left = (rest - _signed(rest, second[:, None])).square().sum()
    return float(left) + (_bell_error(low, best_break(low)) if low.numel() else 0.0)


def _signed(values: Tensor, size: Tensor) -> Tensor:
    return torch.where(values < 0, -size, size)
