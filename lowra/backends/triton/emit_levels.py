"""Source of x as integers of 8 bits: the levels that emit_integer.py's products read.

What they mean, `backends/reference/integers.py` says. One level is a byte; for each order, the
bytes of a token lie as words of that width meet them: group after group, and in each a word of four
levels beside every word of codes.
"""

from __future__ import annotations

from lowra.backends.reference.integers import BLOCK, FINE, SMALLEST
from lowra.backends.triton.keys import TERNARY_ID, QuantizeKey, WeightKey
from lowra.backends.triton.overlap import SIGNAL, WAIT
from lowra.backends.triton.tiles import largest, summed
from lowra.compiler.packing import FORMATS, TERNARY_TILE, TILE

SPAN = 2048
"""BLOCK, up to a power of two."""


def order_of(width: int) -> int:
    """The order in which words of rows of this width id meet x: 3 bits are read as 2, and so are
    numbers of 3 bits, of trellis codes of 2."""
    return 2 if width in (3, 12) else width


def orders_of(weight: WeightKey) -> tuple[int, ...]:
    """The orders that the rows of a weight need, as `QuantizeKey` lists them."""
    return tuple(sorted({order_of(panel.width) for panel in weight.panels}))


def stride(width: int) -> str:
    """Words from one group to the next: those of a row of codes, up to a multiple of 4."""
    words = "chunks" if width == TERNARY_ID else f"chunks * {FORMATS[width].planes[0]}"
    return f"(({words} + 3) // 4 * 4)"


def line_words(k: int) -> int:
    """Words that hold a token's levels in any one order: a multiple of 16."""
    return TERNARY_TILE // 4 * (k // TERNARY_TILE + 1) + 32


def quantize_body(key: QuantizeKey) -> list[str]:
    """A block of a token: its step, its sum, and its levels in every order."""
    copies = 2 if key.fine else 1
    lines = [
        *([SIGNAL, WAIT] if key.signals else []),
        "token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)",
        f"i = tl.arange(0, {SPAN})",
        f"c = block * {BLOCK} + i",
        f"inside = i < {BLOCK}",
        "v = tl.load(x + token * k + c, mask=inside & (c < k), other=0.0).to(tl.float32)",
        "finite = tl.abs(v) < float('inf')",
        f"broken = {largest('tl.where(finite, 0, 1)', 0)} > 0",
        "v = tl.where(finite, v, 0.0)",
        f"top = tl.maximum({largest('tl.abs(v)', 0)}, {SMALLEST})",
        "step = tl.where(broken, float('nan'), top / 127.0)",
        "v *= 127.0 / top",
        "q = tl.floor(v + 0.5)",
    ]
    if key.fine:
        lines += [f"p = tl.floor((v - q) * {FINE}.0 + 0.5)", f"total = q + p / {FINE}.0"]
    lines += [
        "at = token * tl.num_programs(1) + block",
        "tl.store(steps + at, step)",
        f"tl.store(sums + at, step * {summed('total' if key.fine else 'q', 0)})",
        f"bytes = level_bytes + token * line * {4 * copies * len(key.orders)}",
    ]
    for i, order in enumerate(key.orders):
        lines += _ternary_places() if order == TERNARY_ID else _places(order)
        for copy, level in enumerate("qp"[:copies]):
            base = f"line * {4 * (copies * i + copy)}"
            lines.append(f"tl.store(bytes + {base} + at, {level}.to(tl.int8), mask=known)")
    return lines


def _places(order: int) -> list[str]:
    """`at`, the byte of column c: field f of word v of its tile is byte b of group g. Trellis codes
    of 1 and 3 bits give numbers of 2 and 4 by two words, the first of every second field."""
    where = {
        1: "b, g = f // 8, f % 8",
        2: "b, g = f % 8 // 2, 2 * (f // 8) + f % 2",
        4: "b, g = f % 4, f // 4",
        11: "b, g = f // 2 % 8 // 2, 4 * (f % 2) + 2 * (f // 16) + f // 2 % 2",
        13: "b, g = f // 2 % 4, 2 * (f % 2) + f // 8",
    }
    bits = FORMATS[order].planes[0]
    size = 8 * bits
    return [
        "chunks = (k + 31) // 32",
        f"short = tl.maximum((chunks - k // {TILE} * 8) * {bits}, 1)",
        f"words = tl.where(c // {TILE} < k // {TILE}, {size}, short)",
        f"f, v = c % {TILE} // words, c % {TILE} % words",
        where[order],
        f"at = (g * {stride(order)} + c // {TILE} * {size} + v) * 4 + b",
        "known = inside & (c < chunks * 32)",
    ]


def _ternary_places() -> list[str]:
    """The same; digit f of the bytes of a word is group f."""
    return [
        "chunks = (k + 19) // 20",
        f"full = k // {TERNARY_TILE}",
        "short = tl.maximum(4 * (chunks - full * 16), 1)",
        f"size = tl.where(c // {TERNARY_TILE} < full, 64, short)",
        f"f, v = c % {TERNARY_TILE} // size, c % {TERNARY_TILE} % size",
        f"at = (f * {stride(TERNARY_ID)} + c // {TERNARY_TILE} * 16) * 4 + v",
        f"known = inside & (c < full * {TERNARY_TILE} + 5 * 4 * (chunks - full * 16))",
    ]
