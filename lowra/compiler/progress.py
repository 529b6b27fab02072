"""Progress of long work: passes and workflows name their stages, a front end may show them.

Nothing is shown unless `show_progress` is active, and nothing is timed unless `record_stages` is.
Both are context variables: they hold for the code that runs inside the `with` block, in the same
thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Stage(Protocol):
    """One piece of work under way."""

    def advance(self, n: int = 1) -> None:
        """Count `n` more units (of the stage's `total`) as done."""

    def say(self, text: str) -> None:
        """Show `text` behind the stage's title, in place of what was said before."""


class _Reporter(Protocol):
    """Something that shows stages."""

    def begin(self, title: str, total: int | None) -> int: ...

    def advance(self, task: int, n: int) -> None: ...

    def say(self, task: int, text: str) -> None: ...

    def end(self, task: int) -> None: ...


_REPORTER: ContextVar[_Reporter | None] = ContextVar("lowra_reporter", default=None)
_RECORDERS: ContextVar[tuple[dict[str, float], ...]] = ContextVar("lowra_recorders", default=())


@contextmanager
def stage(title: str, total: int | None = None) -> Generator[Stage, None, None]:
    """Run the block as a stage called `title`; `total` is its number of units, None if unknown.

    Yields a `Stage`, whose `advance(n=1)` counts finished units. The wall time in seconds is added
    to every active `record_stages`, also when the block raises.
    """
    reporter = _REPORTER.get()
    start = time.perf_counter()
    try:
        if reporter is None:
            yield _SILENT
        else:
            with _shown(reporter, title, total) as shown:
                yield shown
    finally:
        seconds = time.perf_counter() - start
        for recorder in _RECORDERS.get():
            recorder[title] = recorder.get(title, 0.0) + seconds


@contextmanager
def record_stages() -> Generator[dict[str, float], None, None]:
    """Collect the wall time of the stages run inside: yields {title: seconds}, summed by title.

    Nested recorders all count. A stage inside a stage counts for both titles.
    """
    recorder: dict[str, float] = {}
    token = _RECORDERS.set((*_RECORDERS.get(), recorder))
    try:
        yield recorder
    finally:
        _RECORDERS.reset(token)


@contextmanager
def show_progress() -> Generator[None, None, None]:
    """Show the stages run inside as bars on stderr, if that is a terminal; else stay silent."""
    if _REPORTER.get() is not None or not sys.stderr.isatty():
        yield
        return
    reporter = _RichReporter()
    token = _REPORTER.set(reporter)
    try:
        with reporter.progress:
            yield
    finally:
        _REPORTER.reset(token)


class _SilentStage:
    def advance(self, n: int = 1) -> None:
        return

    def say(self, text: str) -> None:
        return


_SILENT = _SilentStage()


class _ShownStage:
    def __init__(self, reporter: _Reporter, task: int) -> None:
        self._reporter = reporter
        self._task = task

    def advance(self, n: int = 1) -> None:
        self._reporter.advance(self._task, n)

    def say(self, text: str) -> None:
        self._reporter.say(self._task, text)


@contextmanager
def _shown(reporter: _Reporter, title: str, total: int | None) -> Generator[Stage, None, None]:
    task = reporter.begin(title, total)
    try:
        yield _ShownStage(reporter, task)
    finally:
        reporter.end(task)


class _RichReporter:
    """Bars drawn by rich: outer stages stay when they end, inner ones disappear."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self.progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(file=sys.stderr),
        )
        self._open: list[int] = []
        self._titles: dict[int, str] = {}

    def begin(self, title: str, total: int | None) -> int:
        task = self.progress.add_task(title, total=total)
        self._open.append(task)
        self._titles[task] = title
        return task

    def advance(self, task: int, n: int) -> None:
        self.progress.advance(self._id(task), n)

    def say(self, task: int, text: str) -> None:
        self.progress.update(self._id(task), description=f"{self._titles[task]}  {text}")

    def end(self, task: int) -> None:
        self._open.remove(task)
        if self._open:
            self.progress.remove_task(self._id(task))
            return
        ended = next(t for t in self.progress.tasks if t.id == task)
        if ended.total is None:
            self.progress.update(self._id(task), total=1, completed=1)
        self.progress.stop_task(self._id(task))

    @staticmethod
    def _id(task: int):
        from rich.progress import TaskID

        return TaskID(task)
