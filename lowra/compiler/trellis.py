"""Trellis codes: the levels that a row may use at a column follow from the rows stored before it.

Trellis-coded quantization (Marcellin and Fischer, IEEE Trans. Comm. 38, 1990): a codebook of
twice as many levels as the stored bits can name is cut into four subsets, level l into subset l mod
4. The lowest stored bit of a code does not name a level: a convolutional code of 64 states
(Ungerboeck, IEEE Trans. Inf. Theory 28, 1982, table I: parity checks 103 and 024) makes two bits of
it and of the lowest bits of the six rows above, and these name the subset. The other stored bits
choose in it.

    low  = u[r-2] ^ u[r-4]          u[r] the lowest stored bit of row r at this column,
    high = u[r] ^ u[r-1] ^ u[r-6]   0 before the first row of a run
    level = 4 * (stored >> 1) + 2 * high + low

Rows of a panel form runs of 64, each with a past of zeros: what a run stores depends on no other.
A Gaussian at 2 bits keeps 8.2 % of its energy as error this way, 11.7 % with the best four levels,
and no code can do better than 6.3 %.

In code, a *code* is the number of a level, as for every other row; only packed words hold stored
bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

RUN = 64
"""Rows of a run; the last run of a panel may be shorter."""

LOW_TAPS = (2, 4)
HIGH_TAPS = (0, 1, 6)
"""Rows back whose lowest stored bits are added up, modulo 2."""

MEMORY = max(LOW_TAPS + HIGH_TAPS)
"""Rows before a row that its levels depend on."""


def codes_of(stored: Tensor) -> Tensor:
    """Codes of stored bits, both integer [rows, ...], from the first row of a panel on."""
    rows = stored.shape[0]
    bits = _runs(stored & 1)
    low, high = (_parity(bits, taps).flatten(0, 1)[:rows] for taps in (LOW_TAPS, HIGH_TAPS))
    return (stored >> 1 << 2) | (high << 1) | low


def stored_of(codes: Tensor) -> Tensor:
    """The inverse of `codes_of`. Raises ValueError for codes that no stored bits lead to."""
    rows = codes.shape[0]
    wanted = _runs((codes >> 1) & 1)
    bits = torch.zeros_like(wanted)
    for row in range(bits.shape[1]):
        bits[:, row] = wanted[:, row]
        for tap in HIGH_TAPS[1:]:
            if row >= tap:
                bits[:, row] ^= bits[:, row - tap]
    stored = (codes >> 2 << 1) | bits.flatten(0, 1)[:rows]
    if not torch.equal(codes_of(stored), codes):
        raise ValueError("codes leave the trellis: a row's level is not one that its run allows")
    return stored


def _runs(rows: Tensor) -> Tensor:
    """[rows, ...] as [runs, RUN, ...], filled up with zeros."""
    count = -(-rows.shape[0] // RUN)
    padded = rows.new_zeros(count * RUN, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    return padded.view(count, RUN, *rows.shape[1:])


def _parity(bits: Tensor, taps: tuple[int, ...]) -> Tensor:
    total = torch.zeros_like(bits)
    for tap in taps:
        total[:, tap:] ^= bits[:, : RUN - tap]
    return total


def codes_in_window(stored: Tensor) -> Tensor:
    """Codes [rows, ...] of stored bits [MEMORY + 1, rows, ...] in the order of `window`, 0 where
    the run has no row."""
    low, high = (
        functools.reduce(torch.bitwise_xor, [stored[tap] & 1 for tap in taps])
        for taps in (LOW_TAPS, HIGH_TAPS)
    )
    return (stored[0] >> 1 << 2) | (high << 1) | low


def window(rows: Tensor) -> Tensor:
    """int64 [MEMORY + 1, rows]: the rows themselves, then those 1, 2, ... before each in a panel;
    -1 where the run has none."""
    back = torch.arange(MEMORY + 1, device=rows.device).unsqueeze(1)
    return torch.where(rows % RUN >= back, rows - back, -1)
