"""The exact count of the bits that a row, and a site beside its rows, take in a file."""

from __future__ import annotations

from lowra.compiler.compact import PLAIN, Compact
from lowra.compiler.packing import levels_of, row_words, width_id
from lowra.compiler.storage import NO_SCALES, ROW_SCALES, scale_groups

ROW_WIDTH_BITS = 4
"""Bits that a row spends on naming its own width."""


def row_bits(k: int, width: float, group: int, shared: bool, compact: Compact = PLAIN) -> int:
    """Stored bits of one row of `width`: codes with padding, scales, own codebook, width tag."""
    id = width_id(width)
    codebook = 0 if shared else _table_bits(width, compact)
    scales = compact.scale_bits * scale_groups(k, group)
    tops = 16 if compact.scale_bits < 16 and group > 0 else 0
    return 32 * row_words(k, id) + scales + tops + codebook + ROW_WIDTH_BITS


def _table_bits(width: float, compact: Compact) -> int:
    top = 0 if compact.codebook_bits == 16 else 16
    return compact.codebook_bits * levels_of(width_id(width)) + top


def site_bits(
    n: int, widths: tuple[float, ...], shared: bool,
    compact: Compact = PLAIN, group: int = NO_SCALES, k: int = 1,
) -> int:  # fmt: skip
    """Bits beside the rows: shared codebooks of `widths`, the reach of compact row scales, and the
    half-empty bytes of an odd count of widths and of 4-bit scales."""
    bits = sum(_table_bits(width, compact) for width in widths) if shared else 0
    bits += ROW_WIDTH_BITS * (n % 2)
    bits += 32 if compact.scale_bits < 16 and group == ROW_SCALES else 0
    return bits + (4 * (n * scale_groups(k, group) % 2) if compact.scale_bits == 4 else 0)
