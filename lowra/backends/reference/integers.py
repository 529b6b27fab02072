"""What products in integers mean, which GPU kernels compute where `set_activations` allows it.

x is read as levels q with a step per block of 1280 columns, a 127th of its largest magnitude:
x = step q; the codebooks of rows of 2, 3 and 4 bits and of trellis codes likewise, with one step
per codebook. With `fine`, a second level holds what the first one leaves: step (q + p / 254).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowra.backends.reference.linear import stored_rows
from lowra.compiler.packing import levels_of
from lowra.compiler.rotation import Rotation, rotate

BLOCK = 1280
"""Columns that share a step: a multiple of 256 and of 320, so that tiles of all widths begin where
a block does."""
FINE = 254
"""Of a second level in a first one: it is at most half a step away."""
SMALLEST = 1e-30
"""A step is no less than a 127th of it, so that steps have an inverse in float32."""
LOOKED_UP = (2, 3, 4, 11, 12, 13)
"""Width ids of rows whose codebooks are rounded; of others, the codes are multiplied."""


def as_levels(values: Tensor, fine: bool) -> Tensor:
    """float64 [rows, columns] of float32: every row by its own step."""
    largest = values.abs().amax(1, keepdim=True).clamp(min=SMALLEST)
    given = values * (127 / largest)
    whole = (given + 0.5).floor()
    second = ((given - whole) * FINE + 0.5).floor().double() / FINE if fine else 0
    return (largest / 127).double() * (whole.double() + second)


def inputs_as_read(x: Tensor, fine: bool) -> Tensor:
    """float64 [m, k]: x in stored coordinates, by its levels."""
    return torch.cat([as_levels(block, fine) for block in x.float().split(BLOCK, 1)], 1)


def codebooks_as_read(codebooks: Tensor, panels: list[int], fine: bool) -> Tensor:
    """float64, flat: codebooks as a packed weight holds them, by their levels."""
    pairs = list(zip(panels[0::2], panels[1::2], strict=True))
    flat = codebooks.reshape(-1).float()
    shared = flat.numel() == sum(levels_of(id) for id, _ in pairs)
    sizes = [levels_of(id) * (1 if shared else rows) for id, rows in pairs]
    made = [
        as_levels(values.view(-1, levels_of(id)), fine).reshape(-1)
        if id in LOOKED_UP else values.double()
        for (id, _), values in zip(pairs, flat.split(sizes), strict=True)
    ]  # fmt: skip
    return torch.cat(made)


def weight_as_read(packed: tuple[Any, ...], fine: bool) -> Tensor:
    """float64 W [n, k] in stored coordinates."""
    codes, books, scales, order, panels, k, group, *_ = packed
    read = codebooks_as_read(books, panels, fine)
    return stored_rows(codes, read, scales, order, panels, k, group, torch.float64)


def integer_product(x: Tensor, packed: tuple[Any, ...], fine: bool) -> Tensor:
    """float64 y [m, n] of x [m, k], which is rotated in float32 as the weight is and rounded to its
    own dtype. A kernel with `fine` leaves out second levels of x by second levels of codebooks."""
    turned = rotate(x.float(), Rotation(*packed[7:9])).to(x.dtype)
    return inputs_as_read(turned, fine) @ weight_as_read(packed, fine).T
