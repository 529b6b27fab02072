"""Text that reads the codes of a tile of rows and gives its values, block of columns by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lowra.backends.triton.keys import TERNARY_ID, PanelKey, WeightKey
from lowra.backends.triton.lookups import TABLE_WORDS
from lowra.backends.triton.targets import Target
from lowra.backends.triton.trellis_words import TAPS, number_lines, number_words, past_line
from lowra.compiler.packing import FORMATS, levels_of

TERNARY_FIELD = 64
BLOCK_COLUMNS = 128
"""Of a block of a full tile; of 256, values would take twice the registers."""


@dataclass(frozen=True)
class Reading:
    """How values are read: `exact` gives them as float32 from memory, else in `dtype`, by byte
    permutes where the target and the width allow. `warps` are those that multiply: rows are dealt
    out to them as they will be multiplied (`dealt_rows`); 0 leaves rows as they are, and takes the
    words of whole fields at a time, so that columns follow each other."""

    target: Target
    weight: WeightKey
    dtype: str
    rows: int
    warps: int = 0
    exact: bool = False

    def words(self, width: int) -> int:
        """Neighbouring words of a row that are read at a time."""
        return 8 if self.warps else field_words(width)

    def permutes(self, width: int) -> bool:
        halves = self.dtype in ("bfloat16", "float16")
        return not self.exact and halves and self.target.permutes and width in TABLE_WORDS


@dataclass(frozen=True)
class Block:
    """Values [rows, columns] under the name `values`; their columns under `c`, which follow each
    other from `first` on; in a tail they do not, and `c_ok` masks those that there are."""

    values: str
    first: str
    tail: bool


Use = Callable[[Block], list[str]]
"""Lines that do something with a block."""


def indented(lines: list[str], by: int = 1) -> list[str]:
    return ["    " * by + line for line in lines]


def summed(text: str, axis: int) -> str:
    """tl.sum itself is none of the functions that the interpreter runs, nor is tl.max."""
    return f"tl.reduce({text}, {axis}, tl.standard._sum_combine)"


def largest(text: str, axis: int) -> str:
    return f"tl.reduce({text}, {axis}, tl.standard._elementwise_max)"


def field_words(width: int) -> int:
    """Words of a plane's full tile, and columns that a field of them covers."""
    return 8 * FORMATS[width].planes[0]


def fields_at_once(weight: WeightKey, width: int) -> int:
    """Neighbouring fields that a block takes: half a tile, or where scales come in groups as many
    as share a scale."""
    if width == TERNARY_ID:
        return 1
    count = BLOCK_COLUMNS // field_words(width)
    if weight.group > 0:
        fit = weight.group // field_words(width)
        if fit >= 2 and fit & (fit - 1) == 0:
            return min(fit, count)
    return count


def shares_scale(weight: WeightKey, width: int) -> bool:
    """Whether a block of a full tile lies in one group."""
    covered = TERNARY_FIELD
    if width != TERNARY_ID:
        covered = fields_at_once(weight, width) * field_words(width)
    return weight.group > 0 and weight.group % covered == 0


def dealt_rows(rows: int, warps: int) -> str:
    """The row that each line of a tile of words holds.

    Loaded words lie in registers like this: 8 lines to a warp, then the next warp, then around
    again. Tensor cores want two times 8 neighbouring lines in a warp. With the lines read in
    another order, both are the same and no value changes its register; `planar` undoes it.
    """
    if not warps:
        return f"tl.arange(0, {rows})"
    i = f"tl.arange(0, {rows})"
    turn = f"({i} // {16 * warps}) * {16 * warps}"
    return f"{turn} + ({i} // 8 % {warps}) * 16 + ({i} // {8 * warps} % 2) * 8 + {i} % 8"


def row_setup(panel: PanelKey) -> list[str]:
    """Offsets of the rows of a panel's tile in its planes."""
    if panel.width == TERNARY_ID:
        return [
            "words = (k + 19) // 20",
            "line = (plane0.to(tl.int64) * 4) + (rw * (words * 4))[:, None]",
            "full = k // 320",
        ]
    lines = ["full = k // 256", "chunks = (k + 31) // 32"]
    for i, bits in enumerate(FORMATS[panel.width].planes):
        lines.append(f"line{i} = plane{i} + (rw * (chunks * {bits}))[:, None]")
    return [*lines, past_line()] if FORMATS[panel.width].trellis else lines


def tile_lines(reading: Reading, panel: PanelKey, tail: bool, use: Use) -> list[str]:
    """The values of tile `t`, block after block, each handed to `use`."""
    if panel.width == TERNARY_ID:
        return list(_ternary_tile(reading, panel, tail, use))
    return list(_spans(reading, panel, tail, use))


def hinted(offset: str, aligned: int, contiguous: int) -> str:
    if aligned == 1:
        return offset
    return f"tl.max_contiguous(tl.multiple_of({offset}, (1, {aligned})), (1, {contiguous}))"


def _load(pointer: str, mask: str = "") -> str:
    masked = f", mask={mask}, other=0" if mask else ""
    return f'tl.load({pointer}{masked}, eviction_policy="evict_first")'


def _spans(reading: Reading, panel: PanelKey, tail: bool, use: Use) -> Iterator[str]:
    """A tile, read a span of words of every row at a time. For products 8: what lies in a register
    then is what tensor cores want there."""
    size, count = field_words(panel.width), reading.words(panel.width)
    spans = [range(start, start + count) for start in range(0, size, count)]
    for i, span in enumerate(spans):
        yield from _tail_words(panel, span) if tail else _full_words(panel, span)
        yield from _fields(reading, panel.width, f"v{i}_")
    yield from _blocks(reading, panel.width, len(spans), tail, use)


def _full_words(panel: PanelKey, span: range) -> list[str]:
    size, trellis, count = field_words(panel.width), FORMATS[panel.width].trellis, len(span)
    start = 0 if trellis else span.start
    aligned = min(2, panel.aligned)
    words = f"line0 + (t * {size} + {start} + tl.arange(0, {count}))[None, :]"
    words = hinted(words, aligned, count)
    lines = [f"w = {_load(f'codes + {words}')}"]
    if trellis:
        first = _pointers(panel, words, count) if span.start == 0 else []
        lines = [*first, *_words_of_run(span.start)]
    if len(FORMATS[panel.width].planes) == 1:
        return lines
    # Field f of word v of the upper plane stands beside field f / 2 of word 8 (f % 2) + v.
    if count > 8:
        v = f"tl.arange(0, {count})"
        above = f"line1 + (t * 8 + {v} % 8)[None, :]"
        return [*lines, f"h = {_load(f'codes + {above}')} >> ({v} // 8)[None, :]"]
    place = hinted("line1 + (t * 8 + tl.arange(0, 8))[None, :]", aligned, 8)
    return [*lines, "h = h >> 1" if span.start else f"h = {_load(f'codes + {place}')}"]


def _tail_words(panel: PanelKey, span: range) -> list[str]:
    """A shorter tile has fields of fewer words; what lies beyond them is masked."""
    size, bits = field_words(panel.width), FORMATS[panel.width].planes[0]
    lines = [
        f"short = (chunks - full * 8) * {bits}",
        f"v = {span.start} + tl.arange(0, {len(span)})",
    ]
    words, ok = f"line0 + (full * {size} + v)[None, :]", "(v < short)[None, :]"
    if FORMATS[panel.width].trellis:
        lines += [*_pointers(panel, words, len(span)), *_words_of_run(0, ok)]
    else:
        lines.append(f"w = {_load(f'codes + {words}', ok)}")
    if len(FORMATS[panel.width].planes) == 2:
        above = "(full * 8 + v % (short // 2))[None, :]"
        lines += [
            f"h = {_load(f'codes + line1 + {above}', '(v < short)[None, :]')}",
            "h = h >> (v // (short // 2))[None, :]",
        ]
    return lines


def _pointers(panel: PanelKey, words: str, count: int) -> list[str]:
    """p to words of every row, and p1, p2, ... so many rows above."""
    above = [f"p - chunks * {tap * FORMATS[panel.width].planes[0]}" for tap in TAPS]
    aligned = 4 * min(2, panel.aligned)
    return [
        f"p = codes + {words}",
        *(f"p{tap} = {hinted(p, aligned, count)}" for tap, p in zip(TAPS, above, strict=True)),
    ]


def _words_of_run(later: int, ok: str = "") -> list[str]:
    """The words w at p and w1, w2, ... above, 0 where the run has no such row."""
    plus, masks = f" + {later}" if later else "", [ok] if ok else []
    lines = [f"w = {_load(f'p{plus}', ok)}"]
    for tap in TAPS:
        there = " & ".join([*masks, f"(past >= {tap})[:, None]"])
        lines.append(f"w{tap} = {_load(f'p{tap}{plus}', there)}")
    return lines


def _blocks(reading: Reading, width: int, spans: int, tail: bool, use: Use) -> Iterator[str]:
    """Neighbouring fields side by side, so that columns follow each other."""
    size, count = field_words(width), 32 // FORMATS[width].planes[0]
    step = BLOCK_COLUMNS // size if tail else fields_at_once(reading.weight, width)
    yield f"j = tl.arange(0, {size * step})"
    for start in range(0, count, step):
        parts = [f"v{i}_{field}" for field in range(start, start + step) for i in range(spans)]
        yield f"a = {planar(parts, reading, size // spans)}"
        first = f"t * 256 + {start * size}"
        if tail:
            yield f"c = full * 256 + ({start} + j // {size}) * short + j % {size}"
            yield f"c_ok = (j % {size} < short) & (c < k)"
        else:
            yield f"c = {first} + j"
        yield from use(Block("a", first, tail))


def _fields(reading: Reading, width: int, name: str) -> list[str]:
    """Values `name`0, `name`1, ... of a row's fields, of words that are loaded."""
    names = [f"{name}{i}" for i in range(32 // FORMATS[width].planes[0])]
    lines = number_lines(width) if FORMATS[width].trellis else []
    turns = number_words(width)
    for i, words in enumerate(turns):
        lines += _fields_of(reading, width, names[i :: len(turns)], words)
    return lines


def _fields_of(reading: Reading, width: int, names: list[str], words: list[str]) -> list[str]:
    if reading.permutes(width):
        given = ", ".join([f"t{i}" for i in range(TABLE_WORDS[width])] + words)
        return [f"{', '.join(names)} = look_up_{width}({given})"]
    bits, lines = 32 // len(names), list[str]()
    for i, name in enumerate(names):
        code = f"(({words[0]} >> {bits * i}) & {(1 << bits) - 1})"
        if len(words) == 2:
            code = f"({code} | ((({words[1]} >> {bits * i}) & 1) << {bits}))"
        lines.append(f"{name} = {_from_memory(reading, width, code)}")
    return lines


def _from_memory(reading: Reading, width: int, code: str) -> str:
    table = f"table + (rw * {levels_of(width)})[:, None]" if reading.weight.own else "table"
    value = f"tl.load(books + {table} + {code}).to(tl.float32)"
    return (
        value if reading.exact or reading.dtype == "float32" else f"{value}.to(tl.{reading.dtype})"
    )


def planar(fields: list[str], reading: Reading, words: int) -> str:
    """Parts [lines, words] of fields side by side as [rows, columns], in the order given."""
    if len(fields) == 1 and not reading.warps:
        return fields[0]
    depth = (len(fields) - 1).bit_length()
    shape, order = (reading.rows, words), [0, *range(2, 2 + depth), 1]
    values = joined(fields)
    if reading.warps:
        lines = (reading.rows // (16 * reading.warps), 2, reading.warps, 8)
        shape = (*lines, words, *[2] * depth)
        values = f"tl.reshape({values}, {shape})"
        order = [0, 2, 1, 3, *range(5, 5 + depth), 4]
    columns = words << depth
    return f"tl.reshape(tl.permute({values}, {tuple(order)}), ({reading.rows}, {columns}))"


def joined(names: list[str]) -> str:
    """Tensors side by side, along new last axes of two each: the last is the lowest bit of a
    tensor's number."""
    if len(names) == 1:
        return names[0]
    return f"tl.join({joined(names[0::2])}, {joined(names[1::2])})"


def _ternary_tile(reading: Reading, panel: PanelKey, tail: bool, use: Use) -> Iterator[str]:
    """Five fields of 64 bytes, or in a tail of `short` ones."""
    field = TERNARY_FIELD
    yield f"j = tl.arange(0, {field})"
    if tail:
        yield "short = 4 * ((k - full * 320 + 19) // 20)"
        pointer = f"code_bytes + (line + (full * {field} + j)[None, :])"
        yield f"w = {_load(pointer, '(j < short)[None, :]')}"
    else:
        place = hinted(f"line + (t * {field} + j)[None, :]", 4 * panel.aligned, field)
        yield f"w = {_load(f'code_bytes + {place}')}"
    if reading.permutes(TERNARY_ID):
        yield "v0, v1, v2, v3, v4 = look_up_9(t0, t1, w)"
    else:
        yield "p = w.to(tl.int32)"
        for i in range(5):
            yield "p = p * 3"
            yield f"v{i} = {_from_memory(reading, TERNARY_ID, '(p >> 8)')}"
            yield "p = p & 255"
    for i in range(5):
        if tail:
            yield f"c = full * 320 + {i} * short + j"
            yield "c_ok = (j < short) & (c < k)"
        first = f"t * 320 + {i * field}"
        if not tail:
            yield f"c = {first} + j"
        yield f"a = {planar([f'v{i}'], reading, field)}"
        yield from use(Block("a", first, tail))
