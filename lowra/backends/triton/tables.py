"""Text of what kernels begin with: where a tile of rows lies, and its codebook in registers."""

from __future__ import annotations

from lowra.backends.triton.lookups import SAME_LEVELS, TABLE_WORDS, look_up
from lowra.compiler.packing import levels_of

DESCRIPTOR = ("width", "stored", "rows", "plane0", "plane1", "table")
"""Of a tile of rows, int32: width id; first stored row; rows; words before its first row in each
plane; codebook values before its table, or before that of its first row."""
PAST = len(DESCRIPTOR)
"""The place behind them: rows of its run above its first row, which trellis codes ask for."""
DESCRIPTOR_SIZE = 8


def descriptor_lines() -> list[str]:
    lines = [f"tile = tiles + tl.program_id(0) * {DESCRIPTOR_SIZE}"]
    return lines + [f"{name} = tl.load(tile + {i})" for i, name in enumerate(DESCRIPTOR)]


HELD = """\
@triton.jit
def held(word):
    return tl.inline_asm_elementwise(
        "{.reg .b32 z; mov.u32 z, %lanemask_lt; shr.u32 z, z, 31; or.b32 $0, $1, z;}", "=r,r",
        [word], dtype=tl.uint32, is_pure=True, pack=1,
    )
"""
"""A word that all threads share, kept in a register of each: in one for all, it would be copied
before every permute that reads it. The shifted mask is 0, which the compiler does not know."""


SETTLED = """\
@triton.jit
def settled(sums):
    return tl.inline_asm_elementwise(
        "mov.f32 $0, $1;", "=f,f", [sums], dtype=tl.float32, is_pure=True, pack=1
    )
"""
"""Sums of a product that has ended. Triton waits for a product where its sums are used; where they
are but the start of the next ones, Triton 3.6 lets it run on into the next turn of the loop, which
may write over the registers that it reads. (Seen on an H200, 2026-11-28: rows of 1 bit gave other
sums every time. In what 3.9 compiles, nothing of the kind was found.)"""


def look_up_source(width: int, own: bool, dtype: str) -> str:
    """A device function that turns words into the values of their fields."""
    block = look_up(width, own)
    given = ", ".join([*(f"t{i}" for i in range(block.tables)), *["w", "h"][: block.words]])
    name = block.name.upper()
    return f"""\
{name} = tl.constexpr({_quoted(block.text)})
{name}_OPERANDS = tl.constexpr("{block.constraints}")


@triton.jit
def {block.name}({given}):
    return tl.inline_asm_elementwise(
        {name}, {name}_OPERANDS, [{given}],
        dtype=(tl.{dtype},) * {block.fields}, is_pure=True, pack={block.pack},
    )
"""


def _quoted(text: str) -> str:
    return f'"""\n{text}\n"""'


def table_lines(width: int, own: bool, dtype: str) -> list[str]:
    """The codebook as halves, then as the words t0, t1, ... that `look_up` wants."""
    levels = levels_of(width)
    base = f"books + table + rw * {levels}" if own else "books + table"
    lines = [f"at = {base}"]
    for i in range(levels):
        value = f"tl.load(at + {i}).to(tl.float32).to(tl.{dtype})"
        lines.append(f"c{i} = {value}.to(tl.uint16, bitcast=True).to(tl.uint32)")
    words = _WORDS[SAME_LEVELS.get(width, width)]
    for i, word in enumerate(words):
        lines.append(f"t{i} = {f'({word})[:, None]' if own else f'held({word})'}")
    assert len(words) == TABLE_WORDS[width]
    return lines


def _bytes(first: int, upper: bool) -> str:
    """Four values' lower or upper bytes in a word."""
    byte = "(c{} >> 8)" if upper else "(c{} & 255)"
    parts = [byte.format(first), *(f"({byte.format(first + i)} << {8 * i})" for i in (1, 2, 3))]
    return " | ".join(parts)


_WORDS = {
    1: ["c0 | (c0 << 16)", "(c0 ^ c1) | ((c0 ^ c1) << 16)"],
    2: ["c0 | (c1 << 16)", "c2 | (c3 << 16)"],
    3: [_bytes(first, upper) for upper in (False, True) for first in (0, 4)],
    4: [_bytes(first, upper) for upper in (False, True) for first in (0, 4, 8, 12)],
    9: ["c0 | (c1 << 16)", "c2"],
}
