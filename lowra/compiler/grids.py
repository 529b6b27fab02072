"""Rows of values as codes on a grid, group by group: what is stored, and what it stands for.

Two grids. *Symmetric*: `levels[code] * scale`, with a fixed table of levels per width and no zero
point; at 1 bit it is sign times scale. *Asymmetric*: `(code - zero) * scale`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.packing import TERNARY, width_id
from lowra.compiler.storage import ROW_SCALES

SYMMETRIC = "symmetric"
ASYMMETRIC = "asymmetric"

WIDTHS = (1, TERNARY, 2, 3, 4)
"""Widths of a symmetric grid; an asymmetric one has 2, 3 or 4 bits."""

ASYMMETRIC_WIDTHS = (2, 3, 4)

_UPPER = {
    1: (1.0,),
    TERNARY: (1.2240064,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (
        0.1283950, 0.3880483, 0.6567592, 0.9423402,
        1.2562313, 1.6180464, 2.0690172, 2.7325897,
    ),
}  # fmt: skip
"""The positive levels. Above 1 bit they are the least-squares quantiser of a normal variable (Max,
IRE Trans. Inf. Theory 6, 1960): entries of singular vectors are close to normal, and the table
costs no bits."""


def levels(width: float) -> Tensor:
    """float32 [levels]: the table of a symmetric grid, ascending; code i stands for entry i."""
    upper = _UPPER[width]
    middle = (0.0,) if width == TERNARY else ()
    return torch.tensor((*(-x for x in reversed(upper)), *middle, *upper))


@functools.cache
def level_tables() -> Tensor:
    """float32 [formats, 16]: the levels of every symmetric grid, by the id of its width."""
    tables = torch.zeros(max(map(width_id, WIDTHS)) + 1, 16)
    for width in WIDTHS:
        found = levels(width)
        tables[width_id(width), : len(found)] = found
    return tables


@dataclass(frozen=True)
class Coded:
    """Rows [rows, length] on a grid, not packed yet.

    codes: uint8 [rows, length]. scales: float16 [rows, groups], what is stored. zeros: uint8
    [rows, groups] of an asymmetric grid, else None. group: columns per scale, the last group may
    be shorter; -1 is one scale per row.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    width: float
    group: int

    @property
    def grid(self) -> str:
        return SYMMETRIC if self.zeros is None else ASYMMETRIC

    def values(self) -> Tensor:
        """float32 [rows, length]."""
        return dequantize(self.codes, self.scales, self.zeros, self.width, self.group)

    def rows(self, start: int, stop: int) -> Coded:
        zeros = None if self.zeros is None else self.zeros[start:stop]
        codes, scales = self.codes[start:stop], self.scales[start:stop]
        return Coded(codes, scales, zeros, self.width, self.group)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, width: float, group: int
) -> Tensor:
    """The meaning of stored codes: float32 [rows, length] from integers of the same shape."""
    scale = per_column(scales.float(), codes.shape[1], group)
    if zeros is None:
        return levels(width)[codes.long()] * scale
    return (codes.float() - per_column(zeros.float(), codes.shape[1], group)) * scale


def per_column(values: Tensor, length: int, group: int) -> Tensor:
    """[rows, groups] as [rows, length], or as [rows, 1] for one group per row."""
    if group == ROW_SCALES:
        return values
    return values.repeat_interleave(group, dim=1)[:, :length]


Grouped = tuple[Tensor, Tensor, Tensor | None]
"""Codes [rows, groups, g], scales and zeros [rows, groups]."""


def by_group(
    rows: Tensor, group: int, width: float, quantize: Callable[[Tensor], Grouped]
) -> Coded:
    """Quantize rows [rows, length] group by group: `quantize` is given float32 [rows, groups, g],
    the whole groups at once and then the shorter last one."""
    count, length = rows.shape
    size = length if group == ROW_SCALES else min(group, length)
    whole = length // size * size
    parts = [quantize(rows[:, :whole].reshape(count, -1, size))]
    if whole < length:
        parts.append(quantize(rows[:, whole:].reshape(count, 1, -1)))
    codes = torch.cat([part[0].reshape(count, -1) for part in parts], dim=1).to(torch.uint8)
    scales = torch.cat([part[1] for part in parts], dim=1).to(torch.float16)
    found = [part[2] for part in parts if part[2] is not None]
    zeros = torch.cat(found, dim=1).to(torch.uint8) if found else None
    return Coded(codes, scales, zeros, width, group)


def in_half(scales: Tensor) -> Tensor:
    """Scales rounded to what float16 holds, and kept finite, as float32."""
    return scales.clamp(max=torch.finfo(torch.float16).max).half().float()
