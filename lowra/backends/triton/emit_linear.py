"""Source of y = x W' + bias + scaling h B', h = x A': `rows` of W times `tokens` per program."""

from __future__ import annotations

from lowra.backends.triton.keys import TERNARY_ID, Blocks, LinearKey, PanelKey, ProductKey
from lowra.backends.triton.overlap import SIGNAL, WAIT
from lowra.backends.triton.tables import descriptor_lines, table_lines
from lowra.backends.triton.targets import Target
from lowra.backends.triton.tiles import (
    Block,
    Reading,
    dealt_rows,
    indented,
    row_setup,
    shares_scale,
    summed,
    tile_lines,
)

FEWEST_OF_A_DOT = 16


def linear_reading(key: LinearKey) -> Reading:
    return Reading(key.target, key.weight, product_dtype(key), key.blocks.rows, key.blocks.warps)


def product_dtype(key: ProductKey) -> str:
    """In what operands are multiplied: the interpreter computes nothing in bfloat16."""
    return key.dtype if key.target.backend else "float32"


def linear_body(key: LinearKey) -> list[str]:
    blocks = key.blocks
    parts = "tl.program_id(2), tl.num_programs(2)" if key.split else "0, 1"
    lines = [
        *descriptor_lines(),
        f"part, parts = {parts}",
        f"rn = tl.minimum(tl.arange(0, {blocks.rows}), rows - 1)",
        f"rw = tl.minimum({dealt_rows(blocks.rows, blocks.warps)}, rows - 1)",
        f"rm = tl.program_id(1) * {blocks.tokens} + tl.arange(0, {blocks.tokens})",
        "token = rm < m",
        "x_line = x + (rm.to(tl.int64) * k)[None, :]",
        f"acc = tl.full(({blocks.rows}, {blocks.tokens}), 0.0, tl.float32)",
    ]
    for i, panel in enumerate(key.weight.panels):
        lines.append(f"{'elif' if i else 'if'} width == {panel.width}:")
        lines += indented(_panel(key, panel))
    if key.waits:
        # Before sums are stored: they may lie where what makes h keeps its own.
        lines += [SIGNAL, WAIT] if key.rank else [SIGNAL]
    then = epilogue(key)
    return lines + (sum_of_parts(blocks, "token[None, :]", then) if key.split else then)


def _panel(key: LinearKey, panel: PanelKey) -> list[str]:
    """acc += a tile of rows of one width times the tokens, over this program's columns."""
    reading = linear_reading(key)

    def use(block: Block) -> list[str]:
        return _multiply(key, panel.width, block)

    lines = [
        *row_setup(panel),
        "share = (full + parts - 1) // parts",
        "start, end = part * share, tl.minimum(part * share + share, full)",
    ]
    if key.waits and not key.rank:
        lines.append(WAIT)  # with factors, only h may be in the making
    if reading.permutes(panel.width):
        lines += table_lines(panel.width, key.weight.own, key.dtype)
    lines += [
        "for t in range(start, end):",
        *indented(tile_lines(reading, panel, False, use)),
    ]
    if key.weight.ternary_tail if panel.width == TERNARY_ID else key.weight.tail:
        tail = tile_lines(reading, panel, True, use)
        lines += ["if part == parts - 1:", *indented(tail)] if key.split else tail
    return lines


def _multiply(key: LinearKey, width: int, block: Block) -> list[str]:
    ok = "c_ok[:, None] & token[None, :]" if block.tail else "token[None, :]"
    lines = [f"b = {_as_operand(key, f'tl.load(x_line + c[:, None], mask={ok}, other=0.0)')}"]
    group = key.weight.group
    if group <= 0:
        return [*lines, f"acc = {settled(key.target, _dot(key, block.values, 'b', 'acc'))}"]
    lines.append(f"groups = (k + {group - 1}) // {group}")
    if shares_scale(key.weight, width) and not block.tail:
        s = f"tl.load(scales + (stored + rn) * groups + ({block.first}) // {group})"
        product = _dot(key, block.values, "b")
        return [*lines, f"s = {s}.to(tl.float32)", f"acc += s[:, None] * {product}"]
    place = f"((stored + rn) * groups)[:, None] + (c // {group})[None, :]"
    mask = ", mask=c_ok[None, :], other=0.0" if block.tail else ""
    scaled = f"({block.values}.to(tl.float32) * s).to(tl.{product_dtype(key)})"
    return [
        *lines,
        f"s = tl.load(scales + {place}{mask}).to(tl.float32)",
        f"acc = {settled(key.target, _dot(key, scaled, 'b', 'acc'))}",
    ]


def settled(target: Target, product: str) -> str:
    """A product in a loop, whose operands may be written over behind it."""
    return f"settled({product})" if target.multiplies_behind else product


def _dot(key: ProductKey, a: str, b: str, acc: str = "") -> str:
    plus = f", {acc}" if acc else ""
    exact = ', input_precision="ieee"' if product_dtype(key) == "float32" else ""
    return f"tl.dot({a}, {b}{plus}{exact})"


def _as_operand(key: LinearKey, text: str) -> str:
    return text if product_dtype(key) == key.dtype else f"{text}.to(tl.{product_dtype(key)})"


def sum_of_parts(blocks: Blocks, there: str, then: list[str]) -> list[str]:
    """Every part leaves its sums of the tokens that are `there`, token by token; the last to arrive
    adds them up in order, so that no order of arrival changes a bit, and leaves the counter as it
    found it."""
    size = blocks.rows * blocks.tokens
    inside = f"tl.arange(0, {blocks.tokens})[None, :] * {blocks.rows}"
    others = f"mask={there}, other=0.0, cache_modifier='.cg'"
    return [
        "place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)",
        f"sums = partial + place.to(tl.int64) * parts * {size}",
        f"inside = tl.arange(0, {blocks.rows})[:, None] + {inside}",
        f"tl.store(sums + part * {size} + inside, acc, mask={there})",
        "tl.debug_barrier()",
        'before = tl.atomic_add(counters + place, 1, sem="acq_rel")',
        "if before == parts - 1:",
        f"    acc = tl.load(sums + inside, {others})",
        "    for i in range(1, parts):",
        f"        acc += tl.load(sums + i * {size} + inside, {others})",
        "    tl.store(counters + place, 0)",
        *indented(then),
    ]


def epilogue(key: ProductKey) -> list[str]:
    """To `acc` [rows, tokens] row scales, bias and factors; then out through the row order."""
    rows, weight = key.blocks.rows, key.weight
    out = "tl.load(order + stored + rn)" if weight.permuted else "stored + rn"
    lines = [f"row = {out}", f"live = (tl.arange(0, {rows}) < rows) & (row >= 0) & (row < n)"]
    if weight.group < 0:
        lines.append("acc *= tl.load(scales + stored + rn).to(tl.float32)[:, None]")
    if key.bias:
        lines.append("acc += tl.load(bias + row, mask=live, other=0.0).to(tl.float32)[:, None]")
    if key.rank:
        lines += _factors(key)
    return [
        *lines,
        "at = y + (rm.to(tl.int64) * n)[None, :] + row[:, None]",
        "tl.store(at, acc.to(y.dtype.element_ty), mask=live[:, None] & token[None, :])",
    ]


def _factors(key: ProductKey) -> list[str]:
    if key.blocks.tokens < FEWEST_OF_A_DOT:
        product = summed("low[:, None, :].to(tl.float32) * tl.trans(h)[None, :, :]", 2)
    else:
        product = _dot(key, "low", "h")
    hidden = (
        "tl.load(hidden + rm[None, :] * rank + r[:, None], mask=some & token[None, :], other=0.0)"
    )
    factor = (
        "tl.load(lora_b + row[:, None] * rank + r[None, :], mask=few & live[:, None], other=0.0)"
    )
    return [
        f"r = tl.arange(0, {key.rank})",
        "some, few = (r < rank)[:, None], (r < rank)[None, :]",
        f"h = {hidden}.to(tl.{product_dtype(key)})",
        f"low = {factor}.to(tl.{product_dtype(key)})",
        f"acc += scaling * {product}",
    ]
