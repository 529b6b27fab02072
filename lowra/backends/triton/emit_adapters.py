"""Source of the two products with adapters in pages: h = A x, then f(y) with B.

What differs between adapters, formats too, is data that the kernels read: chunks, as
compiler/adapter_pages.py describes them. A program serves one slot and one tile of tokens, and ends
at once where none of its tokens has that slot.
"""

from __future__ import annotations

from lowra.backends.triton.keys import ExpandKey, GatherKey
from lowra.backends.triton.tiles import indented
from lowra.compiler.adapter_pages import CORE, DIAGONAL, OUT, POST, ZERO_POINTS, A, B
from lowra.compiler.packing import TERNARY_TILE, TILE

RANKS = 16
"""Rows of A, or of B transposed, that a product takes at a time."""
COLUMNS = 128

PAGES = ["pages", "page_bytes", "halves", "brains", "floats", "tables", "chunks", "bounds"]
"""The memory as integers, bytes, float16, bfloat16 and float32; levels of grids [formats, 16]."""

READ = f'''
@triton.jit
def either(a, b):
    return a | b


@triton.jit
def field(plane, i, c, padded, bits, inside):
    """Bits of column c in row i of a plane, rows of `padded` columns."""
    tile = c // {TILE}
    u = c - tile * {TILE}
    at = i * (padded * bits // 32) + tile * ({TILE // 32} * bits)
    if padded % {TILE} == 0:
        f = u >> (3 + bits // 2)
        at += u & (8 * bits - 1)
    else:
        words = tl.minimum(padded - tile * {TILE}, {TILE}) * bits // 32
        f = u // tl.maximum(words, 1)
        at += u - f * words
    word = tl.load(plane + at, mask=inside, other=0)
    return (word >> (f * bits)) & ((1 << bits) - 1)


@triton.jit
def digit(row, i, c, columns, inside):
    """The ternary code of column c in row i; rows of bytes."""
    full = columns // {TERNARY_TILE}
    tile = c // {TERNARY_TILE}
    size = tl.where(tile < full, {TERNARY_TILE // 5}, (columns % {TERNARY_TILE} + 19) // 20 * 4)
    u = c - tile * {TERNARY_TILE}
    f = (u >= size).to(tl.int32) + (u >= 2 * size) + (u >= 3 * size) + (u >= 4 * size)
    at = i * ((columns + 19) // 20 * 4) + tile * {TERNARY_TILE // 5} + u - f * size
    byte = tl.load(row + at, mask=inside, other=0).to(tl.int32)
    power = tl.where(f == 0, 1, tl.where(f == 1, 3, tl.where(f == 2, 9, tl.where(f == 3, 27, 81))))
    return (((byte * power) & 255) * 3) >> 8


@triton.jit
def values(
    pages, page_bytes, halves, brains, floats, tables, at, rows, format, columns, group, i, c,
    inside,
):
    """float32: rows i and columns c of the chunk at word `at`, 0 where not `inside`."""
    at = at.to(tl.int64)
    v = inside.to(tl.float32) * 0.0
    even = (columns + 1) // 2 * 2
    if format == 32:
        v = tl.load(floats + at + i * columns + c, mask=inside, other=0.0)
    elif format == 33:
        v = tl.load(halves + 2 * at + i * even + c, mask=inside, other=0.0).to(tl.float32)
    elif format == 34:
        v = tl.load(brains + 2 * at + i * even + c, mask=inside, other=0.0).to(tl.float32)
    else:
        width = format % {ZERO_POINTS}
        code = inside.to(tl.int32) * 0
        words = rows * ((columns + 19) // 20)
        if width == 9:
            code = digit(page_bytes + 4 * at, i, c, columns, inside)
        else:
            padded = (columns + 31) // 32 * 32
            bits = width
            if width == 3:
                bits = 2
            code = field(pages + at, i, c, padded, bits, inside)
            if width == 3:
                code |= field(pages + at + rows * (padded // 16), i, c, padded, 1, inside) << 2
            words = rows * (padded // 32) * width
        place = i + c * 0
        count = rows
        if group > 0:
            groups = (columns + group - 1) // group
            place = i * groups + c // group
            count = rows * groups
        after = at + words
        scale = tl.load(halves + 2 * after + place, mask=inside, other=0.0).to(tl.float32)
        if format < {ZERO_POINTS}:
            v = tl.load(tables + width * 16 + code, mask=inside, other=0.0) * scale
        else:
            zeros = page_bytes + 4 * (after + (count + 1) // 2)
            bit = place * width
            low = tl.load(zeros + bit // 8, mask=inside, other=0).to(tl.int32)
            high = tl.load(zeros + (bit + width - 1) // 8, mask=inside, other=0).to(tl.int32)
            zero = ((low | (high << 8)) >> (bit % 8)) & ((1 << width) - 1)
            v = (code - zero).to(tl.float32) * scale
    return tl.where(inside, v, 0.0)
'''
"""Elements are addressed one by one: what is read is small, and each of its words is read from the
nearest cache after the first time."""

_MEMORY = "pages, page_bytes, halves, brains, floats, tables"
_LINE = [
    "role, first = tl.load(chunks + 7 * line), tl.load(chunks + 7 * line + 1)",
    "rows, format = tl.load(chunks + 7 * line + 2), tl.load(chunks + 7 * line + 3)",
    "columns, group = tl.load(chunks + 7 * line + 4), tl.load(chunks + 7 * line + 5)",
    "at = tl.load(chunks + 7 * line + 6)",
]


def _read(i: str, c: str, inside: str) -> str:
    return f"values({_MEMORY}, at, rows, format, columns, group, {i}, {c}, {inside})"


def _dot(key: GatherKey | ExpandKey, left: str, right: str, sums: str) -> str:
    tensor_cores = key.target.backend == "cuda" and key.dtype != "float32"
    precision = "tf32" if tensor_cores else "ieee"
    return f'tl.dot({left}, {right}, {sums}, input_precision="{precision}")'


def _tokens(key: GatherKey | ExpandKey) -> list[str]:
    return [
        "slot = tl.program_id(0)",
        f"rm = tl.program_id(1) * {key.blocks.tokens} + tl.arange(0, {key.blocks.tokens})",
        "token = rm < m",
    ]


def gather_body(key: GatherKey) -> list[str]:
    """hidden [parts, m, places, rank] in float32: A x of each token and place; a part takes every
    `parts`-th run of columns."""
    store = "hidden + ((part * m + rm) * places + j).to(tl.int64)[:, None] * rank"
    return [
        *_tokens(key),
        "part, parts = tl.program_id(2), tl.num_programs(2)",
        f"mine = tl.full(({key.blocks.tokens},), 0, tl.int32)",
        "for j in range(0, places):",
        "    found = tl.load(slots + rm * places + j, mask=token, other=-1) == slot",
        "    mine |= found.to(tl.int32)",
        "if tl.reduce(mine, 0, either) > 0:",
        "    for line in range(tl.load(bounds + slot), tl.load(bounds + slot + 1)):",
        *indented(_LINE, 2),
        f"        if role == {A}:",
        f"            for start in range(0, rows, {RANKS}):",
        f"                i = start + tl.arange(0, {RANKS})",
        f"                sums = tl.full(({key.blocks.tokens}, {RANKS}), 0.0, tl.float32)",
        f"                for begin in range(part * {COLUMNS}, k, parts * {COLUMNS}):",
        f"                    c = begin + tl.arange(0, {COLUMNS})",
        "                    inside = (c < k)[:, None] & (i < rows)[None, :]",
        f"                    a = {_read('i[None, :]', 'c[:, None]', 'inside')}",
        "                    mask = token[:, None] & (c < k)[None, :]",
        "                    at_x = x + rm.to(tl.int64)[:, None] * k + c[None, :]",
        "                    b = tl.load(at_x, mask=mask, other=0.0).to(tl.float32)",
        f"                    sums = {_dot(key, 'b', 'a', 'sums')}",
        "                for j in range(0, places):",
        "                    ours = tl.load(slots + rm * places + j, mask=token, other=-1) == slot",
        f"                    to = {store} + (first + i)[None, :]",
        "                    tl.store(to, sums, mask=ours[:, None] & (i < rows)[None, :])",
    ]


def expand_body(key: ExpandKey) -> list[str]:
    """out [m, n] += weight (f(y) - y) for the tokens whose `place` holds the slot."""
    tokens = key.blocks.tokens
    return [
        *_tokens(key),
        f"c = tl.program_id(2) * {COLUMNS} + tl.arange(0, {COLUMNS})",
        "ours = tl.load(slots + rm * places + place, mask=token, other=-1) == slot",
        "first_line, last_line = tl.load(bounds + slot), tl.load(bounds + slot + 1)",
        "if (tl.reduce(ours.to(tl.int32), 0, either) > 0) & (last_line > first_line):",
        *indented(_expand(key, tokens)),
    ]


def _expand(key: ExpandKey, tokens: int) -> list[str]:
    row = _read("c[None, :] * 0", "c[None, :]", "(c < n)[None, :]")
    return [
        "diagonal_line, out_line, post_line, cores = -1, -1, -1, 0",
        "for line in range(first_line, last_line):",
        "    role = tl.load(chunks + 7 * line)",
        f"    if role == {CORE}:",
        "        cores += 1",
        f"    if role == {DIAGONAL}:",
        "        diagonal_line = line",
        f"    if role == {OUT}:",
        "        out_line = line",
        f"    if role == {POST}:",
        "        post_line = line",
        f"sums = tl.full(({tokens}, {COLUMNS}), 0.0, tl.float32)",
        "for line_b in range(first_line, last_line):",
        f"    if tl.load(chunks + 7 * line_b) == {B}:",
        "        first_b = tl.load(chunks + 7 * line_b + 1)",
        "        rows_b = tl.load(chunks + 7 * line_b + 2)",
        f"        for start in range(0, rows_b, {RANKS}):",
        f"            i = start + tl.arange(0, {RANKS})",
        "            r = first_b + i",
        f"            h = tl.full(({tokens}, {RANKS}), 0.0, tl.float32)",
        "            if cores == 0:",
        *indented(_hidden("r", "i < rows_b"), 4),
        "                h = low",
        "            else:",
        "                for line_c in range(first_line, last_line):",
        f"                    if tl.load(chunks + 7 * line_c) == {CORE}:",
        *indented(_core(key), 6),
        "            line = line_b",
        *indented(_LINE, 3),
        "            inside = (i < rows_b)[:, None] & (c < n)[None, :]",
        f"            b = {_read('i[:, None]', 'c[None, :]', 'inside')}",
        f"            sums = {_dot(key, 'h', 'b', 'sums')}",
        "change = sums * tl.load(scalings + slot)",
        "if out_line >= 0:",
        "    line = out_line",
        *indented(_LINE),
        f"    change *= {row}",
        "live = ours[:, None] & (c < n)[None, :]",
        "to = rm.to(tl.int64)[:, None] * n + c[None, :]",
        "if post_line >= 0:",
        "    line = post_line",
        *indented(_LINE),
        "    base = tl.load(y + to, mask=live, other=0.0).to(tl.float32)",
        f"    change = {row} * (base + change) - base",
        "share = tl.load(weights + rm * places + place, mask=ours, other=0.0)",
        "before = tl.load(out + to, mask=live, other=0.0).to(tl.float32)",
        "found = before + share[:, None] * change",
        "tl.store(out + to, found.to(out.dtype.element_ty), mask=live)",
    ]


def _hidden(r: str, some: str) -> list[str]:
    """low [tokens, 16]: h at the ranks r where `some`, times the diagonal if there is one."""
    load = "hidden + ((p * m + rm) * places + place).to(tl.int64)[:, None] * rank"
    return [
        f"mask = ours[:, None] & ({some})[None, :]",
        "low = mask.to(tl.float32) * 0.0",
        "for p in range(0, parts):",
        f"    low += tl.load({load} + ({r})[None, :], mask=mask, other=0.0)",
        "if diagonal_line >= 0:",
        "    line = diagonal_line",
        *indented(_LINE),
        f"    low *= {_read(f'({r})[None, :] * 0', f'({r})[None, :]', f'({some})[None, :]')}",
    ]


def _core(key: ExpandKey) -> list[str]:
    """h += C low over all ranks, for those rows r of C that lie in this chunk."""
    return [
        "first_c, rows_c = tl.load(chunks + 7 * line_c + 1), tl.load(chunks + 7 * line_c + 2)",
        "ranks = tl.load(chunks + 7 * line_c + 4)",
        f"for begin in range(0, ranks, {RANKS}):",
        f"    q = begin + tl.arange(0, {RANKS})",
        *indented(_hidden("q", "q < ranks")),
        "    line = line_c",
        *indented(_LINE),
        "    own = (r >= first_c) & (r < first_c + rows_c)",
        "    inside = (q < ranks)[:, None] & own[None, :]",
        f"    core = {_read('(r - first_c)[None, :]', 'q[:, None]', 'inside')}",
        f"    h = {_dot(key, 'low', 'core', 'h')}",
    ]
