"""Pages of one size: memory that is given out and taken back, and adapters laid out in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowra.compiler.adapter_pages import CHUNK, Run, chunk_words
from lowra.compiler.errors import AdapterError

Key = tuple[str, int]
"""A linear's name and a role; or the name of a part of a basis and 0."""

MOST_BYTES = 1 << 33
"""Of a pool: chunks tell the word that they begin at in 31 bits."""

_AT = CHUNK.index("at")
_OPEN = 8
_REST = 16
"""Pages that are still filled up, and the words below which one counts as full."""


@dataclass(frozen=True)
class Image:
    """Rows as they will lie in pages, not placed yet.

    pages: int32 [pages, words]. lines: int32 [chunks, 7], `at` counted from the first page. places:
    by key, the first of its lines and past the last.
    """

    pages: Tensor
    lines: Tensor
    places: dict[Key, tuple[int, int]]

    def placed(self, ids: Sequence[int]) -> Tensor:
        """The lines when page i lies at ids[i]."""
        lines, size = self.lines.clone(), self.pages.shape[1]
        at = lines[:, _AT]
        lines[:, _AT] = torch.tensor(ids, dtype=torch.int32)[at.long() // size] * size + at % size
        return lines


class Memory:
    """`count` pages of `size` words of 32 bits on one device, and which of them are free."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self.count, self.size = count, size
        self.words = torch.zeros(count * size, dtype=torch.int32, device=device)
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def put(self, image: Image) -> list[int]:
        """Copy an image into free pages, of which there must be enough; returns their ids."""
        ids = [self._free.pop() for _ in range(len(image.pages))]
        where = torch.tensor(ids, device=self.words.device)
        self.words.view(self.count, self.size)[where] = image.pages.to(self.words.device)
        return ids

    def give_back(self, ids: Iterable[int]) -> None:
        self._free.extend(ids)


@dataclass
class _Filling:
    """Pages while they are filled: words used of each, and what was put where."""

    size: int
    used: list[int] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    lines: list[tuple[int, ...]] = field(default_factory=list)
    pieces: list[tuple[int, NDArray[np.int32]]] = field(default_factory=list)

    def put(self, role: int, first: int, run: Run) -> None:
        done = 0
        while done < run.rows:
            page, rows = self._room(run, run.rows - done)
            at = page * self.size + self.used[page]
            self.pieces.append((at, run.part(done, done + rows).words()))
            self.lines.append((role, first + done, rows, run.format, run.columns, run.group, at))
            self.used[page] += chunk_words(run.format, rows, run.columns, run.group)
            if self.size - self.used[page] < _REST:
                self.open.remove(page)
            done += rows

    def _room(self, run: Run, most: int) -> tuple[int, int]:
        """A page with room for at least one row, and how many fit."""
        for page in self.open:
            rows = fitting(run, most, self.size - self.used[page])
            if rows:
                return page, rows
        rows = fitting(run, most, self.size)
        if not rows:
            need = 4 * chunk_words(run.format, 1, run.columns, run.group)
            raise AdapterError(
                f"one row of {run.columns} values takes {need} bytes, a page {4 * self.size}: "
                f"make the pool with page_bytes={1 << (need - 1).bit_length()} or more"
            )
        self.used.append(0)
        self.open = [*self.open[-_OPEN + 1 :], len(self.used) - 1]
        return self.open[-1], rows

    def pages(self) -> Tensor:
        words = np.zeros(len(self.used) * self.size, dtype=np.int32)
        for at, piece in self.pieces:
            words[at : at + len(piece)] = piece
        return torch.from_numpy(words).view(len(self.used), self.size)


def fitting(run: Run, most: int, room: int) -> int:
    """How many rows of a run fit into `room` words as one chunk, at most `most`."""

    def words(rows: int) -> int:
        return chunk_words(run.format, rows, run.columns, run.group)

    if words(most) <= room:
        return most
    rows = min(most, room // max(1, words(2) - words(1)) + 1)
    while rows and words(rows) > room:
        rows -= 1
    return rows


def lay_out(parts: Iterable[tuple[Key, tuple[Run, ...]]], size: int) -> Image:
    """Lay parts into pages of `size` words: no row crosses a page, rests are filled up."""
    filling = _Filling(size)
    places: dict[Key, tuple[int, int]] = {}
    for key, runs in parts:
        begin, first = len(filling.lines), 0
        for run in runs:
            filling.put(key[1], first, run)
            first += run.rows
        places[key] = (begin, len(filling.lines))
    lines = torch.tensor(filling.lines, dtype=torch.int32).view(-1, len(CHUNK))
    return Image(filling.pages(), lines, places)
