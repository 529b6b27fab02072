"""Scales and codebooks in fewer bits: small codes, and float16 values that say how far they reach.

Every code decodes to a float16, computed in float64 and rounded once, so an op sees float16 tables
whatever is stored. Encoding what was decoded gives it back: a pass can choose codes for the scale
that will be in the file. docs/storage-format.md, section 6, is the specification.

- a codebook in 8 bits: int8 per value, a float16 `top` per table: top * code / 127;
- scales per group in 8 or 4 bits: a float16 `top` per row: top * code / (2^bits - 1);
- scales per row in 8 or 4 bits, on a geometric grid between two float16 values per site:
  0 for code 0, else low * (high / low)^((code - 1) / (2^bits - 2)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.errors import CheckpointError


@dataclass(frozen=True)
class Compact:
    """In how many bits a scale (16, 8 or 4) and a codebook value (16 or 8) are stored."""

    scale_bits: int = 16
    codebook_bits: int = 16

    def __str__(self) -> str:
        return f"scale_bits={self.scale_bits} codebook_bits={self.codebook_bits}"


PLAIN = Compact()
SCALE_BITS = (4, 8, 16)
CODEBOOK_BITS = (8, 16)


def half(values: Tensor) -> Tensor:
    """Rounded to float16, to nearest, ties to even."""
    return values.to(torch.float16)


def encode_levels(tables: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [t, L] and float16 tops [t] of tables [t, L]; +inf (no level) gets any code."""
    wide = torch.where(torch.isfinite(tables), tables, 0).double()
    tops = half(wide.abs().amax(1))
    safe = torch.where(tops == 0, 1.0, tops.double()).unsqueeze(1)
    return (127 * wide / safe).round().clamp(-127, 127).to(torch.int8), tops


def decode_levels(codes: Tensor, tops: Tensor) -> Tensor:
    """float16 values of int8 codes and of the tops that go with them, of one shape."""
    return half(tops.double() * codes.double() / 127)


def round_levels(tables: Tensor, compact: Compact) -> Tensor:
    """Tables [t, L] or [L] as they are stored, in float32; +inf stays."""
    if compact.codebook_bits == 16:
        return half(tables).float()
    rows = tables.reshape(-1, tables.shape[-1])
    codes, tops = encode_levels(rows)
    values = decode_levels(codes, tops.unsqueeze(1)).float()
    return torch.where(torch.isfinite(rows), values, rows.float()).view(tables.shape)


def span_of(scales: Tensor) -> Tensor:
    """float16 [2]: the smallest and the largest scale above zero; ones where there is none."""
    rounded = half(scales)
    above = rounded[rounded > 0]
    return torch.stack((above.min(), above.max())) if above.numel() else torch.ones(2).half()


def encode_scales(scales: Tensor, bits: int, reach: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """uint8 codes [n, groups] and the float16 values that they reach, of scales (>= 0) [n, groups].

    `reach` [2] is the span of a geometric grid (scales per row); None: a top per row, [n].
    """
    wide = scales.double()
    if bool((wide < 0).any()):
        raise CheckpointError(
            f"a scale of {float(wide.min()):.3g} cannot be stored in {bits} bits, which knows no "
            "sign; compile with scale_bits=16 to train scales freely"
        )
    steps = (1 << bits) - 1
    if reach is None:
        tops = half(wide.amax(1))
        safe = torch.where(tops == 0, 1.0, tops.double()).unsqueeze(1)
        return (steps * wide / safe).round().clamp(0, steps).to(torch.uint8), tops
    low, high = reach.double()
    ratio = torch.log(high / low)
    place = torch.log(wide.clamp_min(1e-30) / low) / (ratio if float(ratio) > 0 else 1.0)
    codes = ((steps - 1) * place).round().clamp(0, steps - 1) + 1
    return torch.where(wide < low.double() / 2, 0, codes).to(torch.uint8), reach


def decode_scales(codes: Tensor, bits: int, reach: Tensor, per_row: bool) -> Tensor:
    """float16 [n, groups]: the inverse; `per_row` tells a geometric grid from a top per row."""
    steps = (1 << bits) - 1
    if not per_row:
        return half(reach.double().unsqueeze(1) * codes.double() / steps)
    low, high = reach.double()
    grid = low * (high / low) ** ((codes.double() - 1) / (steps - 1))
    return half(torch.where(codes == 0, 0.0, grid))


def round_scales(scales: Tensor, compact: Compact, span: Tensor | None) -> Tensor:
    """Scales [n, groups] as they are stored, in float32; `span` where they are one per row."""
    if compact.scale_bits == 16:
        return half(scales).float()
    codes, reach = encode_scales(scales, compact.scale_bits, span)
    return decode_scales(codes, compact.scale_bits, reach, span is not None).float()
