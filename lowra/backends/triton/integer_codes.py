"""Text that turns words of codes into bytes of levels, four to a register, for `dot4`.

Rows of 2, 3 and 4 bits, and of trellis codes, look four numbers of levels up at a time by
`permute`, in a codebook rounded to 127ths of its largest value; with `fine`, in what that leaves,
too. Of rows of 1 bit and of ternary rows the codes themselves are the bytes. docs/storage-format.md
has the order of fields.
"""

from __future__ import annotations

from lowra.backends.reference.integers import FINE, SMALLEST
from lowra.backends.triton.keys import TERNARY_ID, IntegerKey, PanelKey
from lowra.backends.triton.lookups import SAME_LEVELS
from lowra.backends.triton.tiles import hinted
from lowra.backends.triton.trellis_words import TAPS, number_lines, number_words, past_line
from lowra.compiler.packing import FORMATS, WORD_TRITS, levels_of

WORDS = 64
"""Of a row, that a program reads at a time."""
GROUPS = {1: 8, 2: 4, 3: 4, 4: 2, TERNARY_ID: 5, 11: 8, 12: 4, 13: 4}
"""By width id, how many times four codes a word holds."""

_MACHINE = """\
@triton.jit
def permute(a, b, selector):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector],
        dtype=tl.int32, is_pure=True, pack=1,
    )


@triton.jit
def digits(a, b):
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7351;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1,
    )


@triton.jit
def dot4(a, b, c):
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c],
        dtype=tl.int32, is_pure=True, pack=1,
    )
"""
_PLAIN = """\
@triton.jit
def permute(a, b, selector):
    made = selector * 0
    for i in tl.static_range(4):
        s = (selector >> (4 * i)) & 7
        byte = (tl.where(s < 4, a, b) >> (8 * (s & 3))) & 255
        made |= byte << (8 * i)
    return made


@triton.jit
def digits(a, b):
    return ((a >> 8) & 255) | (b & 0xFF00) | (((a >> 24) & 255) << 16) | (((b >> 24) & 255) << 24)


@triton.jit
def dot4(a, b, c):
    for i in tl.static_range(4):
        c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
    return c
"""


def integer_functions(key: IntegerKey) -> list[str]:
    """Device functions: one instruction each, spelt out for the interpreter."""
    return [(_MACHINE if key.target.backend else _PLAIN).rstrip()]


def first_plane(width: int) -> int:
    return FORMATS[width].planes[0]


def row_lines(panel: PanelKey) -> list[str]:
    if panel.width == TERNARY_ID:
        return [
            f"words = (k + {WORD_TRITS - 1}) // {WORD_TRITS}",
            "line0 = plane0 + (rn * words)[:, None]",
        ]
    lines = ["chunks = (k + 31) // 32", f"words = chunks * {first_plane(panel.width)}"]
    if FORMATS[panel.width].trellis:
        lines.append(past_line("rn"))
    for i, bits in enumerate(FORMATS[panel.width].planes):
        lines.append(f"line{i} = plane{i} + (rn * (chunks * {bits}))[:, None]")
    return lines


def book_lines(key: IntegerKey, width: int) -> list[str]:
    """`unit` and `first`: y = unit * (sum of products) + first * sum(x); t0, t1, ... hold the
    codebook as bytes, f0, f1, ... what those leave of it."""
    count = levels_of(width)
    base = f"books + table + rn * {count}" if key.weight.own else "books + table"
    lines = [f"book = {base}"]
    lines += [f"c{i} = tl.load(book + {i}).to(tl.float32)" for i in range(count)]
    column = "[:, None]" if key.weight.own else ""
    if width == 1:
        return [*lines, "unit, first = c1 - c0, c0"]
    if width == TERNARY_ID:
        # c[d] = c0 + rise * d + bend * (d & 2)
        return [
            *lines, f"rise, bend = (c1 - c0){column}, ((c2 - c0) * 0.5 - (c1 - c0)){column}",
            "unit, first = 1.0, c0",
        ]  # fmt: skip
    lines.append(f"top = tl.maximum(tl.abs(c0), {SMALLEST})")
    lines += [f"top = tl.maximum(top, tl.abs(c{i}))" for i in range(1, count)]
    lines += ["unit, first = top / 127.0, 0.0", "inverse = 127.0 / top"]
    for i in range(count):
        lines += [f"c{i} = c{i} * inverse", f"q{i} = tl.floor(c{i} + 0.5)"]
    lines += [f"t{i // 4} = {_bytes('q{}', i)}{column}" for i in range(0, count, 4)]
    if key.fine:
        lines += [f"p{i} = tl.floor((c{i} - q{i}) * {FINE}.0 + 0.5)" for i in range(count)]
        lines += [f"f{i // 4} = {_bytes('p{}', i)}{column}" for i in range(0, count, 4)]
    return lines


def _bytes(name: str, first: int) -> str:
    parts = (f"(({name.format(first + i)}.to(tl.int32) & 255) << {8 * i})" for i in range(4))
    return f"({' | '.join(parts)})"


def word_lines(panel: PanelKey, mask: str) -> list[str]:
    """w, and of two planes h, the upper one's bits beside those of w. Of trellis codes also the
    words at that place in earlier rows, and what they make numbers of levels of."""
    masked = f", mask={mask}[None, :], other=0" if mask else ""
    place = "line0 + word_at[None, :]"
    place = place if mask else hinted(place, panel.aligned, WORDS)
    lines = [f'w = tl.load(codes + {place}{masked}, eviction_policy="evict_first")']
    format_ = FORMATS[panel.width]
    if len(format_.planes) == 2:
        lines += _upper_in_tail(masked) if mask else _upper(panel)
    if not format_.trellis:
        return lines
    for tap in TAPS:
        above = f"{place} - chunks * {tap * format_.planes[0]}"
        above = above if mask else hinted(above, panel.aligned, WORDS)
        there = f"(past >= {tap})[:, None]" + (f" & {mask}[None, :]" if mask else "")
        lines.append(f"w{tap} = tl.load(codes + {above}, mask={there}, other=0)")
    return lines + number_lines(panel.width)


def _upper(panel: PanelKey) -> list[str]:
    """Of full tiles: 64 words that are all there never reach into a shorter one."""
    above = hinted("line1 + (word_at // 16 * 8 + word_at % 8)[None, :]", panel.aligned, 4)
    return [f"h = tl.load(codes + {above}) >> (word_at // 8 % 2)[None, :]"]


def _upper_in_tail(masked: str) -> list[str]:
    return [
        "full = k // 256",
        "half = tl.where(word_at < full * 16, 8, tl.maximum(chunks - full * 8, 1))",
        "inside = word_at % 16",
        "above = (word_at // 16 * 8 + inside % half)[None, :]",
        f"h = tl.load(codes + line1 + above{masked}) >> (inside // half)[None, :]",
    ]


def byte_lines(width: int, table: str, name: str) -> list[str]:
    """Four bytes per group, `name`0, `name`1, ...: what the words `table`0, ... have for the codes
    of the words that are loaded; of 1 bit, the codes; of ternary rows, digits, and under b0, b1,
    ... 2 where such a digit is 2."""
    if width == 1:
        return [f"{name}{i} = (w >> {i}) & 0x01010101" for i in range(8)]
    if width == TERNARY_ID:
        return _digits(name)
    lines, group = list[str](), 0
    for words in number_words(width):
        picked = _looked_up(SAME_LEVELS.get(width, width), words, table)
        lines += [f"{name}{group + i} = {text}" for i, text in enumerate(picked)]
        group += len(picked)
    return lines


def _looked_up(width: int, words: list[str], table: str) -> list[str]:
    """Of words of codes of `width` bits, by half, then by parity of fields."""
    selectors, either = selectors_of(width, words)
    if either:
        (codes,) = selectors
        found = list[str]()
        for shift in ("", " >> 16"):
            low, high = (f"permute({table}{i}, {table}{i + 1}, {codes}{shift})" for i in (0, 2))
            found.append(f"permute({low}, {high}, {either}{shift})")
        return found
    last = 1 if width == 3 else 0
    return [
        f"permute({table}0, {table}{last}, ({codes}){shift})"
        for shift in ("", " >> 16") for codes in selectors
    ]  # fmt: skip


def selectors_of(width: int, words: list[str]) -> tuple[list[str], str]:
    """Of four codes in each half, for even and for odd fields; of 4 bits of all fields, and behind
    them what chooses between the halves of a table."""
    w, h = words[0], words[-1]
    if width == 2:
        return [f"{w} & 0x33333333", f"({w} >> 2) & 0x33333333"], ""
    if width == 3:
        return [
            f"({w} & 0x33333333) | (({h} << 2) & 0x44444444)",
            f"(({w} >> 2) & 0x33333333) | ({h} & 0x44444444)",
        ], ""
    return [f"({w} & 0x77777777)"], f"((({w} >> 1) & 0x44444444) | 0x32103210)"


def _digits(name: str) -> list[str]:
    lines = ["even, odd = w & 0x00FF00FF, (w >> 8) & 0x00FF00FF"]
    for i in range(5):
        lines += ["even, odd = even * 3, odd * 3", f"{name}{i} = digits(even, odd)"]
        lines.append(f"b{i} = {name}{i} & 0x02020202")
        if i < 4:
            lines.append("even, odd = even & 0x00FF00FF, odd & 0x00FF00FF")
    return lines
