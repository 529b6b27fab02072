"""Sites and sizes as text: equal layers in one row, bytes and widths in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    """A table under its title. A column whose name ends in `>` is set to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in columns:
        right = column.endswith(">")
        table.add_column(
            column.removesuffix(">"), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Names and values, one pair per line."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)


def print_skipped(console: Console, skipped: Iterable[Mapping[str, Any]]) -> None:
    """What is not compressed, and why."""
    groups = group_alike(skipped, "shape", "reason")
    rows = [(name, shape_text(row["shape"]), row["reason"]) for name, row, _ in groups]
    if rows:
        print_table(console, "not compressed", ("tensor", "shape>", "why"), rows)


def group_alike(
    rows: Iterable[Mapping[str, Any]], *keys: str
) -> list[tuple[str, Mapping[str, Any], int]]:
    """Rows whose names differ in layer numbers only, and not in `keys`, as one.

    Yields (`model.layers.*.mlp.up_proj x 30`, the first of them, their number).
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row["name"])
        groups.setdefault((pattern, *(str(row[key]) for key in keys)), []).append(row)
    return [
        (f"{key[0]} x {len(alike)}" if len(alike) > 1 else alike[0]["name"], alike[0], len(alike))
        for key, alike in groups.items()
    ]


def shape_text(shape: Iterable[int]) -> str:
    """`576 x 1536`."""
    return " x ".join(map(str, shape))


def widths_text(rows: Mapping[str, int]) -> str:
    """`96 at 2 bit, 32 at 4 bit`, for rows per width."""
    ordered = sorted(rows.items(), key=lambda item: float(item[0]))
    return ", ".join(f"{count} at {width} bit" for width, count in ordered if count)


def bytes_text(count: float) -> str:
    """`12.3 MB`, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    """`8 s`, `4 min` or `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def totals_of(report: Mapping[str, Any]) -> dict[str, str]:
    """The totals of a compile's report, by name: bits, bytes, widths."""
    totals = report["totals"]
    return {
        "sites": f"{totals['sites']}, {totals['weights']:,} weights",
        "stored bits": f"{totals['stored_bits']:.3f} per weight",
        "code bits": f"{totals['code_bits']:.3f} per weight",
        "adapter bits": f"{totals['adapter_bits']:.3f} per weight, beside them",
        "size": f"{bytes_text(totals['bytes'])} ({totals['bytes']:,} bytes)",
        "rows": widths_text(totals["rows"]),
        "assignment": assignment_text(report.get("assignment")),
        "calibration": f"{report['calibration_tokens']:,} tokens",
        "capture": report["capture"],
        "pipeline": report["pipeline"],
    }


def assignment_text(found: Mapping[str, Any] | None) -> str:
    """`expected loss 0.81 nats per token, within 1.2e-07 of the best possible plan`."""
    if found is None:
        return "unknown"
    text = f"expected loss {found['expected_loss']:.4g} {found['unit']}"
    if found["gap"] is None:
        return f"{text}, nothing proven (replayed, one width for all, or ranks too)"
    text += f", at most {found['gap']:.1e} of it above the best plan"
    return f"{text}, {found['price_of_a_bit']:.3g} saved by one more bit"


def print_seconds(console: Console, report: Mapping[str, Any]) -> None:
    """The wall time of each pass, and of what comes before and around them."""
    seconds = report["seconds"]
    passes = re.sub(r"\{.*?\}", "", report["pipeline"]).split()
    names = [n for n in ("capture", "calibration", *passes, "total") if n in seconds]
    print_table(
        console, "time", ("pass", "seconds>"), ((name, f"{seconds[name]:.1f}") for name in names)
    )
