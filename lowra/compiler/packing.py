"""Codes to words and back: planar within tiles of 256 along K, so that unpacking is shifts only.

A row of `k` codes is padded with zeros to a multiple of 32 and cut into tiles of 256; the last
tile may be shorter. In a tile of `t` codes of `b` bits there are `w = t * b / 32` words, and
field `f` of word `v` holds the code of column `k0 + f * w + v`. Codes of 3 bits are two planes:
the low 2 bits, then the high bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTHS = (1, 2, 3, 4, 8)
TILE = 256
WORD_BITS = 32
PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def padded_columns(k: int) -> int:
    """Columns a packed row holds: `k` rounded up to a multiple of 32."""
    return -(-k // WORD_BITS) * WORD_BITS


def row_words(k: int, width: int) -> int:
    """Words of 32 bits that one row of `k` codes of `width` bits takes, padding included."""
    return padded_columns(k) * width // WORD_BITS


def pack_rows(codes: Tensor, width: int) -> Tensor:
    """Pack integer codes [rows, k] in 0..2^width-1 into a flat int32 tensor, plane by plane."""
    rows, k = codes.shape
    padded = torch.zeros(rows, padded_columns(k), dtype=torch.int32, device=codes.device)
    padded[:, :k] = codes
    planes: list[Tensor] = []
    shift = 0
    for bits in PLANES[width]:
        planes.append(_pack_plane((padded >> shift) & ((1 << bits) - 1), bits).reshape(-1))
        shift += bits
    return torch.cat(planes)


def unpack_rows(words: Tensor, rows: int, k: int, width: int) -> Tensor:
    """The codes [rows, k] as int32 from what `pack_rows` made."""
    codes: Tensor | None = None
    start, shift = 0, 0
    for bits in PLANES[width]:
        per_row = row_words(k, bits)
        plane = words[start : start + rows * per_row].view(rows, per_row)
        field = _unpack_plane(plane, bits, padded_columns(k))
        codes = field if codes is None else codes | (field << shift)
        start, shift = start + rows * per_row, shift + bits
    assert codes is not None
    return codes[:, :k]


def _tiles(columns: int) -> list[tuple[int, int]]:
    """(number of tiles, tile length) of the full tiles and of the shorter last one."""
    full, rest = divmod(columns, TILE)
    return [part for part in ((full, TILE), (1, rest)) if part[0] and part[1]]


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=device).view(1, 1, -1, 1)


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    fields = WORD_BITS // bits
    parts: list[Tensor] = []
    start = 0
    for count, length in _tiles(columns):
        tile = codes[:, start : start + count * length].reshape(rows, count, fields, -1)
        shifted = tile << _shifts(bits, codes.device)
        words = shifted[:, :, 0].clone()
        for field in range(1, fields):
            words |= shifted[:, :, field]
        parts.append(words.reshape(rows, -1))
        start += count * length
    return torch.cat(parts, dim=1)


def _unpack_plane(words: Tensor, bits: int, columns: int) -> Tensor:
    rows = words.shape[0]
    mask = (1 << bits) - 1
    parts: list[Tensor] = []
    start = 0
    for count, length in _tiles(columns):
        per_tile = length * bits // WORD_BITS
        tile = words[:, start : start + count * per_tile].reshape(rows, count, 1, per_tile)
        parts.append(((tile >> _shifts(bits, words.device)) & mask).reshape(rows, -1))
        start += count * per_tile
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
