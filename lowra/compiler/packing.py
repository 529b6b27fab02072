"""Codes to words and back: planar within tiles along K, so that unpacking is a few plain steps.

Codes of 1, 2, 4 and 8 bits: a row of `k` codes is padded with zeros to a multiple of 32 and cut
into tiles of 256; the last tile may be shorter. In a tile of `t` codes of `b` bits there are
`w = t * b / 32` words, and field `f` of word `v` holds the code of column `k0 + f * w + v`. Codes
of 3 bits are two planes: the low 2 bits, then the high bit.

Ternary codes: five to a byte, in tiles of 320 columns; see `_pack_ternary`. Trellis codes of 1, 2
and 3 bits: what is stored takes planes as other codes do, and names one of twice as many levels
together with the rows before it; see lowra.compiler.trellis.

Rows are stored by width, widest first; the widths themselves take half a byte each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowra.compiler import trellis

TILE = 256
TERNARY_TILE = 320
WORD_BITS = 32
WORD_TRITS = 20
"""Ternary codes in a word of 32 bits: 3^5 < 2^8, four times."""

TERNARY = 1.6
"""The width of a row of three levels: 32 / 20 bits."""


@dataclass(frozen=True)
class RowFormat:
    """How the codes of a row are stored.

    id: names the format where rows are data: in `row_widths`, in the ops' `panels`, in a file's
    nibble. width: bits per code, and what people and passes call it. levels: values of a codebook.
    planes: bits of each plane of code bits; none for ternary codes. trellis: what is stored and a
    code are two things (lowra.compiler.trellis).
    """

    id: int
    width: float
    levels: int
    planes: tuple[int, ...]
    trellis: bool = False


FORMATS = {
    format_.id: format_
    for format_ in (
        RowFormat(8, 8, 256, (8,)),
        RowFormat(4, 4, 16, (4,)),
        RowFormat(3, 3, 8, (2, 1)),
        RowFormat(13, 3, 16, (2, 1), trellis=True),
        RowFormat(2, 2, 4, (2,)),
        RowFormat(12, 2, 8, (2,), trellis=True),
        RowFormat(9, TERNARY, 3, ()),
        RowFormat(1, 1, 2, (1,)),
        RowFormat(11, 1, 4, (1,), trellis=True),
    )
}
"""Every row format by id, widest first: the order of panels."""

WIDTHS = tuple(sorted({format_.width for format_ in FORMATS.values()}))
_IDS = {(format_.width, format_.trellis): format_.id for format_ in FORMATS.values()}


def width_id(width: float, trellis: bool = False) -> int:
    """The id of a width: 9 for 1.6, else the width itself; 11, 12 and 13 for trellis codes of 1, 2
    and 3 bits (other widths have none, and keep their id)."""
    return _IDS.get((width, trellis)) or _IDS[width, False]


def width_of(id: int) -> float:
    """The width that an id names."""
    return FORMATS[id].width


def levels_of(id: int) -> int:
    """Values in a codebook of rows of this id."""
    return FORMATS[id].levels


def padded_columns(k: int) -> int:
    """Columns a packed row of 1, 2, 3, 4 or 8 bits holds: `k` rounded up to a multiple of 32."""
    return -(-k // WORD_BITS) * WORD_BITS


def row_words(k: int, id: int) -> int:
    """Words of 32 bits that the codes of one row [k] take, padding included."""
    planes = FORMATS[id].planes
    return padded_columns(k) * sum(planes) // WORD_BITS if planes else -(-k // WORD_TRITS)


def pack_rows(codes: Tensor, id: int) -> Tensor:
    """Pack integer codes [rows, k], below levels_of(id), into a flat int32 tensor.

    Trellis codes are those of a panel from its first row on; raises ValueError where they are on no
    path."""
    if not FORMATS[id].planes:
        return _pack_ternary(codes)
    if FORMATS[id].trellis:
        codes = trellis.stored_of(codes)
    rows, k = codes.shape
    padded = torch.zeros(rows, padded_columns(k), dtype=torch.int32, device=codes.device)
    padded[:, :k] = codes
    planes: list[Tensor] = []
    shift = 0
    for bits in FORMATS[id].planes:
        planes.append(_pack_plane((padded >> shift) & ((1 << bits) - 1), bits).reshape(-1))
        shift += bits
    return torch.cat(planes)


def unpack_rows(words: Tensor, rows: int, k: int, id: int) -> Tensor:
    """The codes [rows, k] as int32 from what `pack_rows` made."""
    if not FORMATS[id].planes:
        return _unpack_ternary(words, rows, k)
    stored = stored_bits_of(words, rows, k, id)
    return trellis.codes_of(stored) if FORMATS[id].trellis else stored


def stored_bits_of(words: Tensor, rows: int, k: int, id: int) -> Tensor:
    """What the planes of rows of this id hold, int32 [rows, k]: their codes but for a trellis."""
    codes: Tensor | None = None
    start, shift = 0, 0
    for bits in FORMATS[id].planes:
        per_row = row_words(k, bits)
        plane = words[start : start + rows * per_row].view(rows, per_row)
        field = _unpack_plane(plane, bits, padded_columns(k))
        codes = field if codes is None else codes | (field << shift)
        start, shift = start + rows * per_row, shift + bits
    assert codes is not None
    return codes[:, :k]


def _ternary_tiles(k: int) -> list[tuple[int, int]]:
    """(number of tiles, bytes per tile) of the full tiles and of the shorter last one."""
    full, rest = divmod(k, TERNARY_TILE)
    parts = [(full, TERNARY_TILE // 5), (1, 4 * -(-rest // WORD_TRITS))]
    return [part for part in parts if part[0] and part[1]]


def _pack_ternary(codes: Tensor) -> Tensor:
    """Codes [rows, k] of 0, 1 and 2 into words of 32 bits, flat.

    A tile of t columns from k0 has c = 4 * ceil(t / 20) bytes, and digit f of byte v is column
    k0 + f * c + v, so equal digits of neighbouring bytes are neighbouring columns. A byte is the
    number d0 d1 d2 d3 d4 to base 3 as a fraction of 256, rounded up: ceil(number * 256 / 243).
    Digit f is then the whole part of 3 * (byte * 3^f mod 256) / 256: two products of 8 bits.
    """
    rows, k = codes.shape
    parts: list[Tensor] = []
    start = 0
    for count, size in _ternary_tiles(k):
        stop = min(k, start + count * 5 * size)
        tile = torch.zeros(rows, count * 5 * size, dtype=torch.int32, device=codes.device)
        tile[:, : stop - start] = codes[:, start:stop]
        digits = tile.view(rows, count, 5, size)
        number = digits[:, :, 0]
        for field in range(1, 5):
            number = 3 * number + digits[:, :, field]
        parts.append(((number * 256 + 242) // 243).to(torch.uint8).reshape(rows, -1))
        start = stop
    return torch.cat(parts, dim=1).contiguous().view(torch.int32).reshape(-1)


def _unpack_ternary(words: Tensor, rows: int, k: int) -> Tensor:
    data = words.contiguous().view(rows, -1).view(torch.uint8)
    parts: list[Tensor] = []
    start = 0
    for count, size in _ternary_tiles(k):
        tile = data[:, start : start + count * size].reshape(rows, count, 1, size).int()
        powers = torch.tensor((1, 3, 9, 27, 81), dtype=torch.int32, device=words.device)
        parts.append((((tile * powers.view(1, 1, -1, 1)) & 255) * 3 >> 8).reshape(rows, -1))
        start += count * size
    return torch.cat(parts, dim=1)[:, :k]


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


def trellis_runs(row_widths: Tensor) -> Tensor | None:
    """int64 [n]: the run of trellis codes that each row belongs to, -1 for a row of its own; None
    where all are. Rows of a run keep their order, and are of one width."""
    runs = torch.full(row_widths.shape, -1, dtype=torch.int64, device=row_widths.device)
    count = 0
    for id, format_ in FORMATS.items():
        rows = (row_widths == id).nonzero().squeeze(1)
        if format_.trellis and len(rows):
            inside = torch.arange(len(rows), device=rows.device) // trellis.RUN
            runs[rows] = count + inside
            count += int(inside[-1]) + 1
    return runs if count else None


def panels_of(row_widths: Tensor) -> tuple[tuple[int, int], ...]:
    """(width id, rows) per panel, widest first, of per-row width ids [n]."""
    counts = torch.bincount(row_widths.long(), minlength=max(FORMATS) + 1).tolist()
    return tuple((id, counts[id]) for id in FORMATS if counts[id])


def row_order(row_widths: Tensor) -> Tensor:
    """int32 [n]: the original index of each stored row (widest first, else in order)."""
    place = torch.zeros(max(FORMATS) + 1, dtype=torch.int64, device=row_widths.device)
    place[list(FORMATS)] = torch.arange(len(FORMATS), device=row_widths.device)
    return torch.argsort(place[row_widths.long()], stable=True).to(torch.int32)


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [n] below 16 into uint8 [ceil(n / 2)], the even index in the low half."""
    padded = torch.zeros(2 * (-(-values.numel() // 2)), dtype=torch.uint8, device=values.device)
    padded[: values.numel()] = values
    return padded[0::2] | (padded[1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_nibbles` for `count` values."""
    return torch.stack((packed & 15, packed >> 4), dim=1).reshape(-1)[:count].contiguous()


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """uint8 values below 2^bits as a string of bits, lowest bit first, in uint8, zero-filled."""
    place = np.arange(bits, dtype=np.uint8)
    string = (values.numpy()[:, None] >> place) & 1
    return torch.from_numpy(np.packbits(string.reshape(-1), bitorder="little"))


def unpack_bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack_bits` for `count` values."""
    string = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
    place = np.arange(bits, dtype=np.uint8)
    values = (string.reshape(count, bits) << place).sum(axis=1, dtype=np.uint8)
    return torch.from_numpy(values)
