"""From sums of dL/dW over the weights of each code to gradients of codebooks and scales.

Sums are float32, one flat tensor: panel after panel [rows, groups, levels], in stored order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.packing import levels_of


def sums_size(panels: list[int], groups: int) -> int:
    """Of the flat tensor."""
    pairs = zip(panels[0::2], panels[1::2], strict=True)
    return groups * sum(rows * levels_of(id) for id, rows in pairs)


def gradients_of(sums: Tensor, packed: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """A level's gradient is the sum of scale times sum over the rows that share it; a scale's is
    that of level times sum over the codes."""
    _, codebooks, scales, order, panels, *_ = packed
    groups = sums.new_ones(order.shape[0], 1) if scales is None else scales.view(order.shape[0], -1)
    shared = codebooks.numel() == sum(levels_of(id) for id in panels[0::2])
    of_levels, of_scales = [], []
    for levels, part, factors, table in _by_panel(sums, groups, codebooks, panels, shared):
        rows = (part * factors.unsqueeze(2)).sum(1)
        of_levels.append(rows.sum(0) if shared else rows.reshape(-1))
        of_scales.append((part * table.view(-1, 1, levels)).sum(2).reshape(-1))
    return torch.cat(of_levels), torch.cat(of_scales if scales is not None else [sums[:0]])


def panel_sums(sums: Tensor, panels: list[int], groups: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, levels, view [rows, groups, levels]) per panel."""
    row = at = 0
    for id, rows in zip(panels[0::2], panels[1::2], strict=True):
        levels = levels_of(id)
        size = rows * groups * levels
        yield row, levels, sums[at : at + size].view(rows, groups, levels)
        row, at = row + rows, at + size


def _by_panel(
    sums: Tensor, scales: Tensor, codebooks: Tensor, panels: list[int], shared: bool
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(levels, sums [rows, groups, levels], scales [rows, groups], its codebooks) per panel."""
    value = 0
    for row, levels, part in panel_sums(sums, panels, scales.shape[1]):
        rows = part.shape[0]
        values = (1 if shared else rows) * levels
        table = codebooks[value : value + values].float()
        yield levels, part, scales[row : row + rows].float(), table
        value += values
