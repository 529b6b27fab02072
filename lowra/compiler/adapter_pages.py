"""How pages of memory hold adapters: what a pool writes and the `lowra::` adapter ops read.

At one linear [n, k] an adapter j makes of the base's product y = W x

    f_j(y) = d_j * (y + s_j o_j * B_j C_j A_j x)

with A [r, k], B [n, r], a core C, and vectors o, d [n]; every part but A and B may be missing. Each
part is rows of values under a *role*: A as it is, B transposed, C as it is or as its diagonal, and
o and d as one row. Rows of one format are a `Run`. A page holds *chunks*, runs that do not leave
it, each described by one line of integers: the columns of `CHUNK`.

Words of a chunk: the codes as `pack_rows` makes them, then the scales in half precision, then zero
points at their width, each filled up to a word of 32 bits. Dense rows are their values, each row
filled up to a word. The last word of a factor's pages is never shared by two chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lowra.compiler.errors import AdapterError
from lowra.compiler.grids import levels, per_column
from lowra.compiler.packed_adapter import PackedFactor
from lowra.compiler.packing import (
    FORMATS,
    pack_bits,
    row_words,
    unpack_bits,
    unpack_rows,
    width_id,
    width_of,
)
from lowra.compiler.storage import scale_groups

A, B, CORE, DIAGONAL, OUT, POST = range(6)
"""Roles. CORE: C [r, r']; DIAGONAL: C's diagonal [1, r]; OUT: o [1, n]; POST: d [1, n]."""

CHUNK = ("role", "first", "rows", "format", "columns", "group", "at")
"""Columns of a chunk's line, int32: its role, the first row and how many of its part, the format,
columns that are stored (at least those that are used), columns per scale (-1: one per row), and the
word that it begins at."""

ZERO_POINTS = 16
"""Added to a format's id where rows have zero points."""

DENSE = {32: torch.float32, 33: torch.float16, 34: torch.bfloat16}
"""Formats of dense rows."""

_DENSE_IDS = {dtype: id for id, dtype in DENSE.items()}


@dataclass(frozen=True)
class Run:
    """Rows [rows, columns] of one format, on the host: numpy's arrays, whose slices cost a tenth of
    torch's, and an adapter has a thousand runs.

    planes: int32 [rows, words] each, the words of a row one plane after another. scales: float16
    [rows, groups]; None for dense rows. zeros: uint8, the zero points [rows, groups] at their width
    as `pack_bits` makes them; None where there are none.
    """

    format: int
    columns: int
    group: int
    planes: tuple[NDArray[np.int32], ...]
    scales: NDArray[np.float16] | None = None
    zeros: NDArray[np.uint8] | None = None

    @property
    def rows(self) -> int:
        return self.planes[0].shape[0]

    def part(self, start: int, stop: int) -> Run:
        """Some of the rows; views, but for zero points."""
        if start == 0 and stop == self.rows:
            return self
        scales = None if self.scales is None else self.scales[start:stop]
        zeros = None if self.zeros is None else self._zeros(start, stop)
        planes = tuple(plane[start:stop] for plane in self.planes)
        return Run(self.format, self.columns, self.group, planes, scales, zeros)

    def _zeros(self, start: int, stop: int) -> NDArray[np.uint8]:
        assert self.zeros is not None and self.scales is not None
        groups, width = self.scales.shape[1], self.format - ZERO_POINTS
        points = unpack_bits(torch.from_numpy(self.zeros), self.rows * groups, width)
        return pack_bits(points[start * groups : stop * groups], width).numpy()

    def words(self) -> NDArray[np.int32]:
        """int32 [chunk_words]: the rows as a chunk."""
        parts = [plane.reshape(-1) for plane in self.planes]
        if self.scales is not None:
            parts.append(_words(self.scales.reshape(-1)))
        if self.zeros is not None:
            parts.append(_words(self.zeros))
        return np.concatenate(parts)


@functools.lru_cache(maxsize=4096)
def chunk_words(format: int, rows: int, columns: int, group: int) -> int:
    """Words that rows take as one chunk."""
    if format in DENSE:
        return rows * -(-columns * DENSE[format].itemsize // 4)
    scales = rows * scale_groups(columns, group)
    words = rows * row_words(columns, format % ZERO_POINTS) + -(-scales // 2)
    return words + (-(-scales * (format - ZERO_POINTS) // 32) if format > ZERO_POINTS else 0)


def dense_run(values: Tensor) -> Run:
    """Dense rows [rows, columns] in float16, bfloat16 or float32."""
    if values.dtype not in _DENSE_IDS:
        raise AdapterError(f"rows of {values.dtype}; pages hold {', '.join(map(str, _DENSE_IDS))}")
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"rows {list(values.shape)} of an adapter hold NaN or infinity")
    rows, columns = values.shape
    odd = columns * values.element_size() % 4 != 0
    padded = functional.pad(values.detach().cpu(), (0, int(odd))).contiguous()
    plane = padded.view(torch.int32).view(rows, -1).numpy()
    return Run(_DENSE_IDS[values.dtype], columns, -1, (plane,))


def packed_runs(factor: PackedFactor) -> Iterator[Run]:
    """The segments of a packed factor; views."""
    codes, scales, zeros = (t.numpy() for t in (factor.codes, factor.scales, factor.zeros))
    groups = scale_groups(factor.length, factor.group)
    word = scale = byte = 0
    for segment in factor.segments:
        sizes = segment.sizes(factor.length, factor.group)
        next_word, next_scale = word + sizes["codes"], scale + sizes["scales"]
        next_byte = byte + sizes["zeros"]
        format, points = width_id(segment.width), None
        planes = _planes(codes[word:next_word], segment.rows, factor.length, format)
        if next_byte > byte:
            format, points = format + ZERO_POINTS, zeros[byte:next_byte]
        of_rows = scales[scale:next_scale].reshape(segment.rows, groups)
        yield Run(format, factor.length, factor.group, planes, of_rows, points)
        word, scale, byte = next_word, next_scale, next_byte


def _planes(
    codes: NDArray[np.int32], rows: int, columns: int, id: int
) -> tuple[NDArray[np.int32], ...]:
    bits = FORMATS[id].planes
    if len(bits) < 2:
        return (codes.reshape(rows, -1),)
    found: list[NDArray[np.int32]] = []
    for words in (row_words(columns, width) for width in bits):
        done = sum(plane.size for plane in found)
        found.append(codes[done : done + rows * words].reshape(rows, words))
    return tuple(found)


def read_chunk(pages: Tensor, line: Sequence[int]) -> Tensor:
    """float32 [rows, columns]: the values of a chunk."""
    _, _, rows, format, columns, group, at = line
    size = chunk_words(format, rows, columns, group)
    words = pages[at : at + size]
    if format in DENSE:
        return words.view(rows, -1).view(DENSE[format])[:, :columns].float()
    id = format % ZERO_POINTS
    at, count = rows * row_words(columns, id), rows * scale_groups(columns, group)
    codes = unpack_rows(words[:at], rows, columns, id).long()
    scales = words[at:].view(torch.float16)[:count].view(rows, -1)
    scale = per_column(scales.float(), columns, group)
    if format < ZERO_POINTS:
        return levels(width_of(id)).to(pages.device)[codes] * scale
    bits = words[at + -(-count // 2) :].view(torch.uint8).cpu()
    zeros = unpack_bits(bits, count, id).view(rows, -1).to(pages.device)
    return (codes.float() - per_column(zeros.float(), columns, group)) * scale


def _words(values: NDArray[Any]) -> NDArray[np.int32]:
    """Values of 1 or 2 bytes as words, filled up with zeros."""
    whole = np.zeros(-(-values.nbytes // 4), dtype=np.int32)
    whole.view(values.dtype)[: values.size] = values
    return whole
