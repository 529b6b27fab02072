"""Source of codes by error feedback or coordinate descent: a panel of columns per launch.

Columns come in turn, and what an earlier one of the panel changed counts for the later ones; so a
program takes rows, which know nothing of each other. Matrices of columns and rows are transposed,
[k, n]: neighbouring rows lie side by side.
"""

from __future__ import annotations

from lowra.backends.triton.keys import RoundKey
from lowra.backends.triton.tiles import indented, summed

PANEL = 64


def rounding_body(key: RoundKey) -> list[str]:
    """codes and `changes` of the columns from `first` on, as torch's `feedback_codes` and
    `descend_codes` (backends/reference/feedback.py) make them; row i of `matrix` holds what the
    columns before i do to it."""
    rows = key.blocks.rows
    return [
        f"rn = tl.program_id(0) * {rows} + tl.arange(0, {rows})",
        "row = rn < n",
        "table = tables + rn.to(tl.int64) * levels",
        f"l = tl.arange(0, {key.levels})[None, :]",
        "some = row[:, None] & (l < levels - 1)",
        "lower = tl.load(table[:, None] + l, mask=some, other=float('inf'))",
        "upper = tl.load(table[:, None] + l + 1, mask=some, other=float('inf'))",
        "thresholds = (lower + upper) * 0.5",
        f"j = tl.arange(0, {PANEL})",
        f"changed = tl.full(({rows}, {PANEL}), 0.0, tl.float32)",
        f"for i in range(0, tl.minimum({PANEL}, k - first)):",
        *indented(_column(key)),
    ]


def _column(key: RoundKey) -> list[str]:
    lines = [
        "column = (first + i).to(tl.int64)",
        "at = column * n + rn",
        "effects = tl.load(matrix + column * k + first + j, mask=j < i, other=0.0)",
        "own = tl.load(matrix + column * k + column)",
        "v = tl.load(given + at, mask=row, other=0.0)",
        f"v -= {summed('changed * effects[None, :]', 1)}",
    ]
    if key.descends:
        lines += ["before = tl.load(values + at, mask=row, other=0.0)", "v = before + v / own"]
    if key.scaled:
        place = "tl.load(columns + column) * n + rn"
        lines.append(f"scale = tl.load(scales + {place}, mask=row, other=1.0)")
    wanted = "tl.div_rn(v, scale)" if key.scaled else "v"
    scaled = " * scale" if key.scaled else ""
    return [
        *lines,
        f"code = {summed(f'({wanted}[:, None] > thresholds).to(tl.int32)', 1)}",
        f"level = tl.load(table + code, mask=row, other=0.0){scaled}",
        "change = level - before" if key.descends else "change = (v - level) / own",
        *(["tl.store(values + at, level, mask=row)"] if key.descends else []),
        "tl.store(codes + at, code.to(tl.uint8), mask=row)",
        "tl.store(changes + i * n + rn, change, mask=row)",
        "changed = tl.where(j[None, :] == i, change[:, None], changed)",
    ]
