"""lowra export: the compressed graph as a file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowra.cli.options import JsonOption, ModelArgument, OverwriteOption, VerboseOption
from lowra.cli.sources import load_source
from lowra.cli.tables import bytes_text


def export_model(
    ctx: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.pt2", help="The archive to write.")],
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write the graph of MODEL as a .pt2 archive of torch.export."""
    import lowra.api
    from lowra.compiler.progress import show_progress, stage

    with show_progress():
        loaded, _ = load_source(model)
        with stage(f"export {out}", None):
            lowra.api.export(loaded, out, overwrite=overwrite)
    size = out.stat().st_size
    data = {"model": model, "path": str(out), "bytes": size}
    line = f"wrote {out}, {bytes_text(size)}"
    ctx.obj.show(data, lambda console: console.print(line, soft_wrap=True))
