"""Text that makes numbers of levels of stored trellis codes, a word of columns at a time.

The bits of a number that depend on earlier rows are sums of their words (lowra.compiler.trellis):
w is a word of a row, w1, w2, ... are those at its place so many rows above, h is beside w in the
upper plane. What comes out is laid out as words of plain codes with as many levels are.
"""

from __future__ import annotations

from lowra.backends.triton.tables import PAST
from lowra.compiler.packing import FORMATS
from lowra.compiler.trellis import HIGH_TAPS, LOW_TAPS, RUN

TAPS = tuple(sorted({*LOW_TAPS, *HIGH_TAPS} - {0}))
"""Rows above a row whose words its numbers need."""
EVERY_SECOND, TWO_OF_FOUR = "0x55555555", "0x33333333"


def past_line(rows: str = "rw") -> str:
    """How many rows of its run lie above each of a tile's `rows`."""
    return f"past = (tl.load(tile + {PAST}) + {rows}) % {RUN}"


def number_lines(id: int) -> list[str]:
    """The words that `number_words` names."""
    low, high = (_sum(taps) for taps in (LOW_TAPS, HIGH_TAPS))
    lines = [f"low = {low}", f"high = {high}", f"even = {_beside('low', 'high', 1)}"]
    if id == 11:
        return [*lines, f"odd = {_beside('low', 'high', 1, shift=1)}"]
    if id == 12:
        return [*lines, "h = w >> 1"]
    return [
        *lines,
        f"upper = {_beside('(w >> 1)', 'h', 1)}",
        f"odd = {_beside('even', 'upper', 2, shift=2)}",
        f"even = {_beside('even', 'upper', 2)}",
    ]


def number_words(id: int) -> list[list[str]]:
    """Words of codes by turns: the first hold every first field of a row, ... Two of a turn are
    a plane of 2 bits and the bit above it."""
    if FORMATS[id].trellis:
        return [["even", "h"]] if id == 12 else [["even"], ["odd"]]
    return [["w", "h"]] if len(FORMATS[id].planes) == 2 else [["w"]]


def _sum(taps: tuple[int, ...]) -> str:
    return " ^ ".join(f"w{tap or ''}" for tap in taps)


def _beside(low: str, high: str, bits: int, shift: int = 0) -> str:
    """Every other `bits` bits of two words, those of `high` above those of `low`."""
    mask = EVERY_SECOND if bits == 1 else TWO_OF_FOUR
    if shift:
        low, high = f"({low} >> {shift})", f"({high} >> {shift})"
    return f"({low} & {mask}) | (({high} & {mask}) << {bits})"
