"""lowra inspect: what a checkpoint holds, its graph, and whether a model can be traced."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowra.cli.options import JsonOption, VerboseOption
from lowra.cli.sources import load_source
from lowra.cli.tables import (
    group_alike,
    print_facts,
    print_skipped,
    print_table,
    shape_text,
    totals_of,
    widths_text,
)

if TYPE_CHECKING:
    from rich.console import Console

LOST = "without a graph: no Session, no export to .pt2; compile, save and generate work"


def inspect_model(
    ctx: typer.Context,
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A checkpoint folder; any MODEL for --explain-capture"),
    ],
    site: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Only the sites that it matches.")
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Print the program as text.")] = False,
    explain_capture: Annotated[
        bool, typer.Option("--explain-capture", help="Say whether torch.export works, and why not.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Print the GPU kernels of its products as source.")
    ] = False,
    target: Annotated[
        str, typer.Option(metavar="ARCH", help="With --kernels: sm80, sm90, sm100 or gfx942.")
    ] = "sm90",
    tokens: Annotated[
        int, typer.Option(min=1, help="With --kernels: how many tokens are multiplied at once.")
    ] = 1,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show a checkpoint: width, bits and error per site, totals, what was skipped and why.

    The tables come from lowra.json. With --graph the tensors are read, and checked, too.
    """
    from lowra.compiler.progress import show_progress

    with show_progress():
        if explain_capture:
            data = {"path": path, "capture": _explain(path)}
        elif kernels:
            data = {"path": path, **_kernels(path, target, tokens)}
        elif graph:
            data = {"path": path, "graph": _graph(path)}
        else:
            data = {"path": path, **_tables(Path(path).expanduser(), site)}
    ctx.obj.show(data, lambda console: _render(console, data))


def _tables(path: Path, pattern: str | None) -> dict[str, Any]:
    """The manifest's report. Raises CheckpointError when it is broken, PatternError."""
    from lowra.compiler.errors import CheckpointError
    from lowra.compiler.program import select
    from lowra.runtime.manifest import MANIFEST, read_manifest

    manifest = read_manifest(path)
    try:
        data = {name: manifest[name] for name in ("format_version", "lowra", "fingerprint")}
        data |= {"recipe": manifest["recipe"], **manifest["report"]}
        sites = {row["name"]: row for row in data["sites"]}
        _check_printable(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        raise CheckpointError(
            f"{path / MANIFEST} has a broken report ({kind}: {error}): fetch or write the "
            "checkpoint again"
        ) from error
    if pattern is not None:
        chosen = select(sites, [pattern], "site")
        data["sites"] = [row for name, row in sites.items() if name in chosen]
    return data


def _check_printable(data: Mapping[str, Any]) -> None:
    """Raise what printing the tables would raise, before half of them is printed."""
    totals_of(data)
    for row in data["sites"]:
        _row(row)
    for _, row, _ in group_alike(data["skipped"], "shape", "reason"):
        shape_text(row["shape"])


def _graph(path: str) -> str:
    """The program of a model as text, captured again. Raises CaptureError without a graph."""
    from dataclasses import replace

    from lowra.compiler.printer import print_program
    from lowra.runtime.compiled import compiled
    from lowra.runtime.session import program_of

    model, _ = load_source(path)
    program, info = program_of(model), compiled(model)
    return print_program(program if info is None else replace(program, sites=info.sites))


def _kernels(path: str, target: str, tokens: int) -> dict[str, Any]:
    from dataclasses import asdict

    from lowra.workflows.kernels import kernels_of

    model, _ = load_source(path)
    made, declined = kernels_of(model, target, tokens)
    return {"kernels": [asdict(kernel) for kernel in made], "declined": declined}


def _explain(path: str) -> dict[str, Any]:
    from lowra.compiler.capture import capture

    model, _ = load_source(path)
    program = capture(model)
    return {
        "model": type(model).__name__,
        "works": program.graph is not None,
        "inputs": list(program.inputs),
        "operations": 0 if program.graph is None else len(program.graph.nodes),
        "why_not": program.warning or None,
    }


def _render(console: Console, data: Mapping[str, Any]) -> None:
    if "capture" in data and isinstance(data["capture"], Mapping):
        console.print(_explanation(data["capture"]), soft_wrap=True)
    elif "kernels" in data:
        for kernel in data["kernels"]:
            console.print(f"# sites: {', '.join(kernel['sites'])}", soft_wrap=True, markup=False)
            console.print(kernel["source"], soft_wrap=True, markup=False, highlight=False)
        for site, why in data["declined"].items():
            console.print(f"# no kernel for {site}: {why}", soft_wrap=True, markup=False)
    elif "graph" in data:
        console.print(data["graph"], end="", soft_wrap=True)
    else:
        _render_tables(console, data)


def _explanation(found: Mapping[str, Any]) -> str:
    if not found["works"]:
        return f"torch.export does not trace {found['model']}: {found['why_not']}\n{LOST}"
    inputs = ", ".join(found["inputs"])
    return f"torch.export traces {found['model']}({inputs}): {found['operations']} operations"


def _render_tables(console: Console, data: Mapping[str, Any]) -> None:
    columns = ("site", "shape>", "rows", "stored bits>", "error>", "with adapter>", "rank>")
    print_table(console, "sites", columns, (_row(row) for row in data["sites"]))
    print_skipped(console, data["skipped"])
    about = {"checkpoint": data["path"], "written by": f"lowra {data['lowra']}"}
    print_facts(console, about | {"base": data["fingerprint"], **totals_of(data)})


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    adapter = row["error_with_adapter"]
    return (
        row["name"],
        shape_text(row["shape"]),
        widths_text(row["rows"]),
        f"{row['stored_bits']:.3f}",
        f"{row['error']:.4f}",
        "" if adapter is None else f"{adapter:.4f}",
        str(row["rank"]),
    )
