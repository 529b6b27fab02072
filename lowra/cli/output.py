"""Where words go: results to stdout, as text or as one JSON document; all the rest to stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 160


class Output:
    """The output of one run of the command line.

    `resumable` is set by a command that goes on where it was when it is interrupted and run again.
    """

    def __init__(self, *, as_json: bool, verbose: bool) -> None:
        self.as_json = as_json
        self.verbose = verbose
        self.resumable = False
        self._stdout = sys.stdout

    @contextmanager
    def in_use(self) -> Generator[None, None, None]:
        """Log to stderr; under `--json`, keep what others print out of stdout."""
        quiet = redirect_stdout(sys.stderr) if self.as_json else nullcontext()
        with quiet, _logging(logging.INFO if self.verbose else logging.WARNING):
            yield

    def show(self, data: Mapping[str, Any], render: Callable[[Console], None]) -> None:
        """The result of a command: `data` as JSON, or what `render` prints."""
        if self.as_json:
            self._write_json(data)
        else:
            render(console_on(self._stdout))

    def note(self, text: str) -> None:
        """A line for the person at the terminal."""
        typer.echo(text, err=True)

    def fail(self, message: str, kind: str, details: str = "", prefix: str = "error: ") -> None:
        """One line on stderr, after `details` if there are any; under `--json` also a document."""
        message = " ".join(message.split())
        if details:
            typer.echo(details, err=True)
        typer.echo(f"{typer.style(prefix, fg='red')}{message}" if prefix else message, err=True)
        self.fail_json(message, kind)

    def fail_json(self, message: str, kind: str) -> None:
        """The error as a JSON document, if that is what the run prints."""
        if self.as_json:
            self._write_json({"error": message, "kind": kind})

    def _write_json(self, data: Mapping[str, Any]) -> None:
        text = json.dumps(_strict(data), indent=2, default=str, allow_nan=False)
        self._stdout.write(text + "\n")
        self._stdout.flush()


def console_on(stream: TextIO) -> Console:
    """A rich console that writes text as it is; wide where nobody watches."""
    from rich.console import Console

    watched = stream.isatty() or "COLUMNS" in os.environ
    return Console(
        file=stream,
        width=None if watched else PIPE_WIDTH,
        markup=False,
        emoji=False,
        highlight=False,
    )


def _strict(value: Any) -> Any:
    """`value` without the numbers that JSON lacks: infinity and NaN become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


class _CurrentStderr:
    """Whatever sys.stderr is when a line is written, so that lines go above progress bars."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


@contextmanager
def _logging(level: int) -> Generator[None, None, None]:
    """Show lowra's log records of `level` and above on stderr."""
    from rich.logging import RichHandler

    console = console_on(cast("TextIO", _CurrentStderr()))
    handler = RichHandler(level, console, show_time=False, show_path=False)
    logger = logging.getLogger("lowra")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
