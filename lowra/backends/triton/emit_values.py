"""Source of the values of W: one tile of rows and one of columns per program."""

from __future__ import annotations

from dataclasses import replace

from lowra.backends.triton.keys import TERNARY_ID, PanelKey, ValuesKey
from lowra.backends.triton.tables import descriptor_lines, table_lines
from lowra.backends.triton.tiles import Block, Reading, indented, row_setup, tile_lines


def values_body(key: ValuesKey) -> list[str]:
    """out [n, last - first], in stored coordinates and the given order of rows, exact."""
    rows, weight = key.blocks.rows, key.weight
    row = "tl.load(order + stored + rn)" if weight.permuted else "stored + rn"
    lines = [
        *descriptor_lines(),
        f"rn = tl.minimum(tl.arange(0, {rows}), rows - 1)",
        "rw = rn",
        f"row = {row}",
        f"live = ((tl.arange(0, {rows}) < rows) & (row >= 0) & (row < n))[:, None]",
        "to = out + (row.to(tl.int64) * (last_column - first_column) - first_column)[:, None]",
    ]
    if weight.group < 0:
        lines.append("row_scale = tl.load(scales + stored + rn).to(tl.float32)[:, None]")
    for i, panel in enumerate(weight.panels):
        lines.append(f"{'elif' if i else 'if'} width == {panel.width}:")
        lines += indented(_panel(key, panel))
    return lines


def values_reading(key: ValuesKey, width: int) -> Reading:
    """By byte permutes where there are some, of codebooks as stored, in float16: exact as well."""
    reading = Reading(key.target, key.weight, "float16", key.blocks.rows)
    return reading if reading.permutes(width) else replace(reading, exact=True)


def _panel(key: ValuesKey, panel: PanelKey) -> list[str]:
    reading = values_reading(key, panel.width)
    length = 320 if panel.width == TERNARY_ID else 256

    def use(block: Block) -> list[str]:
        return _store(key, block)

    lines = [
        *row_setup(panel),
        *(table_lines(panel.width, key.weight.own, "float16") if not reading.exact else []),
        f"t = first_column // {length} + tl.program_id(1)",
        f"if t < tl.minimum(full, (last_column + {length - 1}) // {length}):",
        *indented(tile_lines(reading, panel, False, use)),
    ]
    if key.weight.ternary_tail if panel.width == TERNARY_ID else key.weight.tail:
        lines += [
            f"if (t == full) & (full * {length} < last_column):",
            *indented(tile_lines(reading, panel, True, use)),
        ]
    return lines


def _store(key: ValuesKey, block: Block) -> list[str]:
    group = key.weight.group
    ok = "live & c_ok[None, :]" if block.tail else "live"
    lines = [f"a = {block.values}"] if block.values != "a" else []
    lines.append("a = a.to(tl.float32)")
    if group < 0:
        lines.append("a = a * row_scale")
    if group > 0:
        place = (
            f"((stored + rn) * ((k + {group - 1}) // {group}))[:, None] + (c // {group})[None, :]"
        )
        mask = ", mask=c_ok[None, :], other=0.0" if block.tail else ""
        lines.append(f"a = a * tl.load(scales + {place}{mask}).to(tl.float32)")
    inside = f"{ok} & (c < last_column)[None, :]"
    return [*lines, f"tl.store(to + c[None, :], a.to(out.dtype.element_ty), mask={inside})"]
