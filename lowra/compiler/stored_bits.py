"""The exact count of the bits that a row, and a site beside its rows, take in a file."""

from __future__ import annotations

from lowra.compiler.compact import PLAIN, Compact
from lowra.compiler.packing import levels_of, row_words
from lowra.compiler.storage import NO_SCALES, ROW_SCALES, scale_groups

ROW_WIDTH_BITS = 4
"""Bits that a row spends on naming its own width."""


def row_bits(k: int, id: int, group: int, shared: bool, compact: Compact = PLAIN) -> int:
    """Stored bits of one row of a width id: codes with padding, scales, own codebook, width tag."""
    codebook = 0 if shared else _table_bits(id, compact)
    scales = compact.scale_bits * scale_groups(k, group)
    tops = 16 if compact.scale_bits < 16 and group > 0 else 0
    return 32 * row_words(k, id) + scales + tops + codebook + ROW_WIDTH_BITS


def _table_bits(id: int, compact: Compact) -> int:
    top = 0 if compact.codebook_bits == 16 else 16
    return compact.codebook_bits * levels_of(id) + top


def site_bits(
    n: int, ids: tuple[int, ...], shared: bool,
    compact: Compact = PLAIN, group: int = NO_SCALES, k: int = 1,
) -> int:  # fmt: skip
    """Bits beside the rows: shared codebooks of width `ids`, the reach of compact row scales, and
    the half-empty bytes of an odd count of widths and of 4-bit scales."""
    bits = sum(_table_bits(id, compact) for id in ids) if shared else 0
    bits += ROW_WIDTH_BITS * (n % 2)
    bits += 32 if compact.scale_bits < 16 and group == ROW_SCALES else 0
    return bits + (4 * (n * scale_groups(k, group) % 2) if compact.scale_bits == 4 else 0)
