"""Codebooks of a packed weight as the tables they are, for what moves their levels."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.compiler.packing import levels_of
from lowra.compiler.storage import PackedWeight


def spacings(packed: PackedWeight) -> Tensor:
    """The mean distance between the levels of each codebook value's table, flat float32."""
    tables = _tables(packed, packed.codebooks.float())
    steps = [(t[:, -1:] - t[:, :1]) / (t.shape[1] - 1) for t in tables]
    return torch.cat([s.expand_as(t).reshape(-1) for s, t in zip(steps, tables, strict=True)])


def ascending(packed: PackedWeight, codebooks: Tensor) -> Tensor:
    """Flat codebooks with no level below the one before it, as the compiler writes them."""
    tables = _tables(packed, codebooks)
    return torch.cat([table.cummax(1).values.reshape(-1) for table in tables])


def _tables(packed: PackedWeight, codebooks: Tensor) -> list[Tensor]:
    """The codebooks by panel, [1 or rows, L]."""
    counts = [(1 if packed.shared else rows, levels_of(id)) for id, rows in packed.panels]
    parts = codebooks.split([tables * size for tables, size in counts])
    return [part.view(shape) for part, shape in zip(parts, counts, strict=True)]
