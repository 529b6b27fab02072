"""The error boundary: what a command may raise, and the line and exit code it becomes."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from lowra.cli.output import Output
from lowra.compiler.errors import LowraError

INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__  # typer exports no name for it


class GuardedGroup(TyperGroup):
    """A group of commands that end in one line and an exit code, whatever happens in them.

    Commands find the `Output` of the run in `ctx.obj`. It is made before their options are parsed,
    so that a mistake in these is reported as `--json` asks, too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        verbose = "-v" in options or "--verbose" in options
        ctx.obj = Output(as_json="--json" in options, verbose=verbose)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with error_boundary(ctx.obj):
            return super().invoke(ctx)


@contextmanager
def error_boundary(output: Output) -> Generator[None, None, None]:
    """Turn what the block raises into a message and `typer.Exit`.

    LowraError: one line, its exit code; the notes and the traceback with `--verbose`. Ctrl-C: 130.
    Usage errors (2) are left to typer. Anything else is a bug: traceback, 1.
    """
    try:
        with output.in_use():
            yield
    except LowraError as error:
        output.fail(str(error), type(error).__name__, _details(error) if output.verbose else "")
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        again = "; run the same command again to resume" if output.resumable else ""
        output.fail(f"interrupted{again}", "KeyboardInterrupt", prefix="")
        raise typer.Exit(INTERRUPTED) from None
    except UsageError as error:
        output.fail_json(error.format_message(), "UsageError")
        raise
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        output.fail(f"{type(error).__name__}: {error}", type(error).__name__, _details(error))
        raise typer.Exit(1) from None


def _details(error: BaseException) -> str:
    """The traceback, with the notes that passes added."""
    return "".join(traceback.format_exception(error))
