"""The typer application: every command under its name. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated

import typer

from lowra.cli.adapter import adapter_app
from lowra.cli.bench import bench
from lowra.cli.compile import compile_model
from lowra.cli.errors import GuardedGroup
from lowra.cli.eval import eval_model
from lowra.cli.export import export_model
from lowra.cli.finetune import finetune_model
from lowra.cli.generate import generate_text
from lowra.cli.inspect import inspect_model
from lowra.cli.plan import plan_model

app = typer.Typer(
    name="lowra",
    cls=GuardedGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lowra import __version__

        typer.echo(f"lowra {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Compress language models to a hard bit budget, and look at what came of it."""


app.command("plan")(plan_model)
app.command("compile")(compile_model)
app.command("finetune")(finetune_model)
app.command("eval")(eval_model)
app.command("inspect")(inspect_model)
app.command("bench")(bench)
app.command("generate")(generate_text)
app.command("export")(export_model)
app.add_typer(adapter_app, name="adapter")
