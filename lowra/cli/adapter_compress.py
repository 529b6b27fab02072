"""lowra adapter compress, inspect and convert: adapters below 2 bits, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.options import JsonOption, OverwriteOption, VerboseOption, refuse_options
from lowra.cli.tables import bytes_text, group_alike, print_facts, print_table, shape_text

if TYPE_CHECKING:
    from rich.console import Console

    from lowra.adapters.loraquant import LoRAQuant
    from lowra.passes.budget.adapter_budget import Budget

SOME_FAILED = 9
"""Exit code where some adapters of a folder could not be compressed: AdapterError's."""


def compress_adapter(
    ctx: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="A PEFT folder, a Hub id, or a folder of PEFT folders."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    bits: Annotated[
        float, typer.Option("--bits", help="Stored bits per adapter parameter, a hard cap.")
    ] = 2.0,
    loraquant: Annotated[
        str | None,
        typer.Option(metavar="BITS@RHO", help="LoRAQuant as published, such as 2@0.8; no budget."),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(help="Values per scale, -1 for one per vector. [-1; 128 for LoRAQuant]"),
    ] = None,
    split: Annotated[
        str, typer.Option(help="LoRAQuant's cut: 'paper', or 'released' as in the authors' code.")
    ] = "paper",
    clip: Annotated[
        str, typer.Option(help="LoRAQuant's high part: search, none, ste, or released.")
    ] = "search",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compress a LoRA adapter, or every adapter in a folder, to packed codes of 1 to 4 bits."""
    from lowra.compiler.progress import show_progress
    from lowra.workflows.compress_adapter import compress_adapters, compress_by, is_adapter

    method = _method(ctx, bits, loraquant, group, split, clip)
    if not source.expanduser().is_dir() or is_adapter(source.expanduser()):
        with show_progress():
            done = compress_by(method, str(source.expanduser()), out, overwrite=overwrite)
        data = done.to_dict()
        ctx.obj.show(data, lambda console: _render_one(console, data))
        return
    finished: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with show_progress():
        found = compress_adapters(source.expanduser(), out, method, overwrite=overwrite)
        for one in found:
            if isinstance(one, tuple):
                failed.append({"name": one[0], "reason": str(one[1])})
            else:
                finished.append({k: v for k, v in one.to_dict().items() if k != "sites"})
    many = {"path": str(out), "adapters": finished, "failed": failed}
    ctx.obj.show(many, lambda console: _render_many(console, finished, failed))
    if failed:
        ctx.obj.note(f"{len(failed)} of {len(failed) + len(finished)} adapters failed")
        raise typer.Exit(SOME_FAILED)


def inspect_adapter(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A packed or a PEFT adapter.")],
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show what an adapter holds: widths, bits and errors, or the spectrum of a plain one."""
    from lowra.compiler.progress import show_progress
    from lowra.workflows.describe_adapter import describe_adapter

    with show_progress():
        data = describe_adapter(path.expanduser())
    ctx.obj.show(data, lambda console: _render_inspected(console, data))


def convert_adapter(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A packed adapter's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The PEFT folder to write.")],
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a packed adapter as plain PEFT, with the values that its codes stand for."""
    from lowra.workflows.compress_adapter import export_adapter

    export_adapter(path.expanduser(), out, overwrite=overwrite)
    data = {"source": str(path), "path": str(out)}
    ctx.obj.show(data, lambda console: console.print(f"wrote {out}", soft_wrap=True))


def _method(
    ctx: typer.Context, bits: float, loraquant: str | None, group: int | None, split: str, clip: str
) -> Budget | LoRAQuant:
    """What the options ask for. Raises RecipeError, BudgetError, and a usage error."""
    from lowra.adapters.loraquant import LoRAQuant
    from lowra.passes.budget.adapter_budget import Budget

    if loraquant is None:
        refuse_options(ctx, ("split", "clip"), "a bit budget: they are for --loraquant")
        return Budget(bits, -1 if group is None else group)
    refuse_options(ctx, ("bits",), "--loraquant, which has no budget")
    high, _, rho = loraquant.partition("@")
    try:
        return LoRAQuant(int(high), float(rho), 128 if group is None else group, split, clip)
    except ValueError:
        raise typer.BadParameter(
            f"{loraquant!r} is not BITS@RHO, such as 2@0.8", param_hint="'--loraquant'"
        ) from None


def _render_one(console: Console, data: Mapping[str, Any]) -> None:
    _print_sites(console, data["sites"])
    print_facts(
        console,
        {
            "adapter": data["source"],
            "method": data["method"],
            "parameters": f"{data['parameters']:,}",
            "stored bits": f"{data['stored_bits']:.3f} per parameter",
            "size": f"{bytes_text(data['file_bytes'])} on disk, was "
            f"{bytes_text(data['plain_bytes'])}",
            "error": f"{data['error']:.4f} of |B A|^2 lost",
            "time": f"{data['seconds']:.1f} s",
        },
    )
    console.print(f"wrote {data['path']}", soft_wrap=True)


def _render_many(
    console: Console, finished: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, str]]
) -> None:
    rows = [
        (
            Path(one["source"]).name, f"{one['parameters']:,}", f"{one['stored_bits']:.3f}",
            bytes_text(one["plain_bytes"]), bytes_text(one["file_bytes"]), f"{one['error']:.4f}",
            f"{one['seconds']:.1f}",
        )
        for one in finished
    ]  # fmt: skip
    columns = (
        "adapter", "parameters>", "stored bits>", "was>", "size>", "error>", "seconds>",
    )  # fmt: skip
    print_table(console, "adapters", columns, rows)
    if failed:
        rows = [(one["name"], one["reason"]) for one in failed]
        print_table(console, "not compressed", ("adapter", "why"), rows)


def _render_inspected(console: Console, data: Mapping[str, Any]) -> None:
    if data["kind"] == "packed":
        _print_sites(console, data["sites"])
    else:
        rows = [
            (
                row["name"], shape_text(row["shape"]), str(row["rank"]), f"{row['norm']:.4g}",
                str(row["directions_80"]), str(row["directions_90"]),
            )
            for row in data["sites"]
        ]  # fmt: skip
        columns = ("site", "shape>", "rank>", "norm>", "directions for 80%>", "for 90%>")
        print_table(console, "sites", columns, rows)
    facts = {
        "adapter": data["path"],
        "kind": data["kind"],
        "base": str(data["base"]),
        "parameters": f"{data['parameters']:,}",
        "stored bits": f"{data['stored_bits']:.3f} per parameter",
        "size": f"{bytes_text(data['file_bytes'])} on disk",
    }
    if data["kind"] == "packed":
        facts["method"] = data["method"]
    print_facts(console, facts)


def _print_sites(console: Console, sites: Sequence[Mapping[str, Any]]) -> None:
    """Rows times width of each segment, `a` for an asymmetric grid; alike sites in one row."""
    rows = [
        (
            name, shape_text(row["shape"]), str(row["rank"]), row["a"], row["b"],
            f"{row['stored_bits']:.3f}", f"{row['error']:.4f}" if count == 1 else "",
        )
        for name, row, count in group_alike(sites, "shape", "rank", "a", "b")
    ]  # fmt: skip
    columns = ("site", "shape>", "rank>", "A, rows x bits", "B", "stored bits>", "error>")
    print_table(console, "sites", columns, rows)
