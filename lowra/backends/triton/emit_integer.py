"""Source of y = x W' for a few tokens of integers (emit_levels.py): four weights an instruction.

`dot4` (dp4a) adds four products of bytes. Codes of 2, 3 and 4 bits and numbers of trellis codes'
levels are looked up as bytes (integer_codes.py). Codes of 1 bit and ternary ones are multiplied
themselves, and the codebook counts as it is stored: y = c0 sum(x) + what codes other than 0 add.

A program takes `rows` rows, 64 words of each at a time, and adds up in float32.
"""

from __future__ import annotations

from lowra.backends.reference.integers import BLOCK, FINE
from lowra.backends.triton.emit_levels import order_of, orders_of
from lowra.backends.triton.emit_linear import epilogue, sum_of_parts
from lowra.backends.triton.integer_codes import (
    GROUPS,
    WORDS,
    book_lines,
    byte_lines,
    first_plane,
    row_lines,
    word_lines,
)
from lowra.backends.triton.keys import TERNARY_ID, IntegerKey, PanelKey
from lowra.backends.triton.overlap import SIGNAL, WAIT
from lowra.backends.triton.tables import descriptor_lines
from lowra.backends.triton.tiles import indented, joined, summed
from lowra.compiler.packing import WORD_TRITS

MOST_BLOCKS = 128
"""Of 1280 columns, that sums are read of."""


def integer_body(key: IntegerKey) -> list[str]:
    rows, tokens = key.blocks.rows, key.blocks.tokens
    orders = orders_of(key.weight)
    lines = [
        *descriptor_lines(),
        f"part, parts = {'tl.program_id(2), tl.num_programs(2)' if key.split else '0, 1'}",
        f"rn = tl.minimum(tl.arange(0, {rows}), rows - 1)",
        f"rm = tl.program_id(1) * {tokens} + tl.arange(0, {tokens})",
        "token = rm < m",
        f"word = tl.arange(0, {WORDS})",
        f"blocks = (k + {BLOCK - 1}) // {BLOCK}",
    ]
    for i in range(tokens):
        one = "line * " + str(len(orders) * (2 if key.fine else 1))
        lines += [
            f"m{i} = tl.minimum(tl.program_id(1) * {tokens} + {i}, m - 1).to(tl.int64)",
            f"x{i}, steps{i} = level_words + m{i} * ({one}), steps + m{i} * blocks",
            f"total{i} = tl.full(({rows},), 0.0, tl.float32)",
        ]
    for i, panel in enumerate(key.weight.panels):
        lines.append(f"{'elif' if i else 'if'} width == {panel.width}:")
        lines += indented(_panel(key, panel, orders.index(order_of(panel.width))))
    lines += [SIGNAL] if key.waits else []
    totals = joined([f"total{i}" for i in range(tokens)])
    lines.append(f"acc = tl.reshape({totals}, ({rows}, {tokens}))")
    then = epilogue(key)
    return lines + (sum_of_parts(key.blocks, "token[None, :]", then) if key.split else then)


def _panel(key: IntegerKey, panel: PanelKey, order: int) -> list[str]:
    """total0, ... [rows]: the sums over this program's words, in the units of the codebook."""
    width = panel.width
    in_a_block = BLOCK // WORD_TRITS if width == TERNARY_ID else BLOCK * first_plane(width) // 32
    step = f"word_at // {in_a_block}"
    lines = [
        *(
            f"y{i} = tl.full(({key.blocks.rows}, {WORDS}), 0.0, tl.float32)"
            for i in range(key.blocks.tokens)
        ),
        *row_lines(panel),
        "stride = (words + 3) // 4 * 4",
        f"whole = words // {WORDS}",
        "share = (whole + parts - 1) // parts",
        "start, end = part * share, tl.minimum(part * share + share, whole)",
        *([WAIT] if key.waits else []),
        *book_lines(key, width),
        f"for t in tl.range(start, end, loop_unroll_factor={key.blocks.stages}):",
        f"    word_at = t * {WORDS} + word",
        *indented(_multiply(key, panel, order, step, "")),
        f"if (part == parts - 1) & (whole * {WORDS} < words):",
        f"    word_at = whole * {WORDS} + word",
        "    ok = word_at < words",
        *indented(_multiply(key, panel, order, step, "ok")),
    ]
    return lines + _totals(key, width)


def _multiply(key: IntegerKey, panel: PanelKey, order: int, step: str, mask: str) -> list[str]:
    """y0, y1, ... += 64 words of each row times their tokens."""
    width, groups = panel.width, GROUPS[panel.width]
    masked = f", mask={mask}, other=0" if mask else ""
    lines = [
        *word_lines(panel, mask),
        *byte_lines(width, "t", "a"),
        *(byte_lines(width, "f", "b") if key.fine and width not in (1, TERNARY_ID) else []),
    ]
    copies = 2 if key.fine else 1
    for token in range(key.blocks.tokens):
        for copy, name in enumerate("uv"[:copies]):
            base = f"x{token} + line * {copies * order + copy}"
            lines += [
                f"{name}{g} = tl.load({base} + stride * {g} + word_at{masked})[None, :]"
                for g in range(groups)
            ]
        lines.append(f"s = tl.load(steps{token} + {step}{masked})[None, :]")
        lines.append(f"y{token} += s * {_products(key, width)}")
    return lines


def _products(key: IntegerKey, width: int) -> str:
    """Of a word's codes with a token, in float32."""
    if width == TERNARY_ID:
        return f"(rise * {_both(key, width, 'a')} + bend * {_both(key, width, 'b')})"
    return _both(key, width, "a")


def _both(key: IntegerKey, width: int, codes: str) -> str:
    whole = f"{_chain(width, [(codes, 'u')])}.to(tl.float32)"
    if not key.fine:
        return whole
    pairs = [(codes, "v")] + ([("b", "u")] if width not in (1, TERNARY_ID) else [])
    return f"({whole} + {_chain(width, pairs)}.to(tl.float32) * {1 / FINE!r})"


def _chain(width: int, pairs: list[tuple[str, str]]) -> str:
    text = "0"
    for codes, levels in pairs:
        for g in range(GROUPS[width]):
            text = f"dot4({codes}{g}, {levels}{g}, {text})"
    return text


def _totals(key: IntegerKey, width: int) -> list[str]:
    lines: list[str] = []
    if width in (1, TERNARY_ID):
        lines = [
            f"b = tl.arange(0, {MOST_BLOCKS})",
            # One part adds what belongs to the sum of x.
            f"mine = b < {'tl.where(part == 0, blocks, 0)' if key.split else 'blocks'}",
        ]
    for i in range(key.blocks.tokens):
        total = f"unit * {summed(f'y{i}', 1)}"
        if width in (1, TERNARY_ID):
            sums = f"tl.load(sums + m{i} * blocks + b, mask=mine, other=0.0)"
            total += f" + first * {summed(sums, 0)}"
        lines.append(f"total{i} += {total}")
    return lines
