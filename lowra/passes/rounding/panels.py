"""A packed weight taken apart into codes, levels and scales, and put together again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.compiler.packing import levels_of, row_words, unpack_rows, width_of
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import PackedWeight, pack_weight, scale_groups


@dataclass(frozen=True)
class Panel:
    """The rows of one width (its id): codes int32 [rows, k], levels float32 [L] shared or [rows,
    L], scales float32 [rows, groups] or None, and the rows' places int64 [rows] in the weight."""

    width: int
    index: Tensor
    codes: Tensor
    levels: Tensor
    scales: Tensor | None


def take_apart(weight: PackedWeight) -> list[Panel]:
    """The panels of a packed weight, widest first."""
    groups = scale_groups(weight.k, weight.group)
    scales = None if weight.scales is None else weight.scales.float().view(weight.n, groups)
    order = weight.order.long()
    panels: list[Panel] = []
    row, word, value = 0, 0, 0
    for width, rows in weight.panels:
        words = rows * row_words(weight.k, width)
        values = (1 if weight.shared else rows) * levels_of(width)
        levels = weight.codebooks[value : value + values].float()
        panels.append(
            Panel(
                width, order[row : row + rows],
                unpack_rows(weight.codes[word : word + words], rows, weight.k, width),
                levels if weight.shared else levels.view(rows, levels_of(width)),
                None if scales is None else scales[row : row + rows],
            )
        )  # fmt: skip
        row, word, value = row + rows, word + words, value + values
    return panels


def put_together(panels: list[Panel], like: PackedWeight) -> PackedWeight:
    """A packed weight of the shape, widths, group and rotation of `like` from its panels."""
    codes = torch.zeros(like.n, like.k, dtype=torch.int32)
    groups = scale_groups(like.k, like.group)
    scales = None if like.scales is None else torch.zeros(like.n, groups)
    most = max(panel.levels.shape[-1] for panel in panels)
    tables = torch.zeros(like.n, most)
    shared: dict[float, Tensor] = {}
    for panel in panels:
        codes[panel.index] = panel.codes
        if scales is not None and panel.scales is not None:
            scales[panel.index] = panel.scales
        if like.shared:
            shared[width_of(panel.width)] = panel.levels
        else:
            tables[panel.index, : panel.levels.shape[-1]] = panel.levels
    books = shared if like.shared else tables
    return pack_weight(
        codes, like.row_widths, books, scales, like.group, like.rotation, like.compact
    )


def rotated_values(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The stored weight [n, k] in the rotated coordinates it is stored in."""
    return replace(packed, rotation=Rotation()).dequantize(dtype)
