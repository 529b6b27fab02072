"""lowra adapter diff: how two adapters differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.options import JsonOption, VerboseOption
from lowra.cli.tables import print_facts, print_table, shape_text

if TYPE_CHECKING:
    from rich.console import Console


def diff_adapter(
    ctx: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="A packed or a PEFT adapter.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="What it is compared with.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare two adapters linear by linear: their products B A, stored bits and spectra."""
    from lowra.compiler.progress import show_progress
    from lowra.workflows.diff_adapters import diff_adapters

    with show_progress():
        data = diff_adapters(first.expanduser(), second.expanduser())
    ctx.obj.show(data, lambda console: _render(console, data))


def _render(console: Console, data: Mapping[str, Any]) -> None:
    rows: list[tuple[str, ...]] = []
    for row in data["sites"]:
        one, two = row["first"], row["second"]
        rows.append(
            (
                row["name"], shape_text(row["shape"]), _number(row["difference"]),
                f"{row['cosine']:.4f}", f"{one['rank']} / {two['rank']}",
                f"{one['stored_bits']:.2f} / {two['stored_bits']:.2f}",
                f"{one['norm']:.3g} / {two['norm']:.3g}",
                f"{one['directions_90']} / {two['directions_90']}",
            )
        )  # fmt: skip
    columns = (
        "site", "shape>", "difference>", "cosine>", "rank>", "bits>", "norm>", "90 % in>",
    )  # fmt: skip
    print_table(console, "sites", columns, rows)
    one, two = data["stored_bits"]
    facts = {
        "first": data["first"],
        "second": data["second"],
        "stored bits": f"{one:.3f} / {two:.3f} per parameter",
        "difference": f"{_number(data['difference'])} of |B A|, over {len(rows)} sites",
    }
    for key, which in (("only_first", "only in first"), ("only_second", "only in second")):
        if data[key]:
            more = len(data[key]) - 3
            facts[which] = ", ".join(data[key][:3]) + (f" and {more} more" if more > 0 else "")
    print_facts(console, facts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
