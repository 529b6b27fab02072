"""A pass, a pipeline of passes, and the text form of both.

A pass is a frozen dataclass whose fields are its options, so `fit-codebooks{group=64}` parses into
an instance and prints back. Between passes the program is verified; a failure leaves with a note
that holds the pass, those done before it, and the printed program.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lowra.compiler.errors import LowraError, PipelineError, nearest
from lowra.compiler.half_products import half_products
from lowra.compiler.offload import Offload
from lowra.compiler.printer import print_program
from lowra.compiler.program import Program
from lowra.compiler.progress import stage
from lowra.compiler.verify import verify

Observer = Callable[["Pass", Program], None]


@dataclass(frozen=True)
class Pass:
    """Base of all passes: declare `name`, `reads`, `writes`; options are fields; write `run`.

    Deciding passes only add facts; rewriting passes consume them. `run` returns a new program and
    never writes into a tensor it was given.
    """

    name: ClassVar[str] = ""
    reads: ClassVar[tuple[type, ...]] = ()
    writes: ClassVar[tuple[type, ...]] = ()

    def require(self, program: Program) -> None:
        """Raise what `run` would raise for a program that it can do nothing with, so that it is
        known before the long work of the passes in front."""

    def run(self, program: Program) -> Program:
        raise PipelineError(f"pass {self.name!r} does not define run()")

    def __str__(self) -> str:
        changed = [
            f"{f.name}={_text(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{' '.join(changed)}}}" if changed else self.name


def run_pipeline(
    program: Program, passes: Sequence[Pass], observe: Observer | None = None,
    heavy: Offload | None = None,
) -> Program:  # fmt: skip
    """Run passes in order, each between checks of what it declares to read and write. `heavy`:
    where their heavy work is done, if not on the CPU."""
    for step in passes if program.sites else ():
        step.require(program)
    for step in passes:
        try:
            program = _run_one(step, program, heavy)
        except LowraError as error:
            error.add_note(f"in pass: {step}")
            error.add_note(f"after: {' '.join(program.history) or 'nothing'}")
            if isinstance(error, PipelineError):
                error.add_note(print_program(program))
            raise
        if observe is not None:
            observe(step, program)
    return program


def _run_one(step: Pass, program: Program, heavy: Offload | None) -> Program:
    for kind in step.reads:
        for site in program.sites:
            program.fact(site.name, kind)
    with stage(step.name, None), half_products(), heavy or nullcontext():
        done = step.run(program)
    for kind in step.writes:
        for site in done.sites:
            if done.find(site.name, kind) is None:
                raise PipelineError(f"pass {step.name} left {site.name} without {kind.__name__}")
    verify(done)
    return replace(done, history=(*program.history, str(step)))


def print_pipeline(passes: Sequence[Pass]) -> str:
    """The pipeline as text; `parse_pipeline` reads it back."""
    return " ".join(str(step) for step in passes)


def parse_pipeline(text: str, known: Sequence[type[Pass]]) -> tuple[Pass, ...]:
    """Passes from text such as `normalize-linears fit-codebooks{widths=1,2 group=64}`."""
    by_name = {kind.name: kind for kind in known}
    steps: list[Pass] = []
    for name, options in re.findall(r"([a-z][a-z0-9-]*)(?:\{([^}]*)\})?", text):
        if name not in by_name:
            raise PipelineError(f"no pass {name!r}; {nearest(name, by_name)}")
        steps.append(_build(by_name[name], options))
    return tuple(steps)


def _build(kind: type[Pass], options: str) -> Pass:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for word in options.split():
        name, _, text = word.partition("=")
        if name not in fields:
            raise PipelineError(f"pass {kind.name} has no option {name!r}; {nearest(name, fields)}")
        values[name] = _value(text, fields[name].default)
    return kind(**values)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_text(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str, default: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(_scalar(item) for item in text.split(",") if item)
    return _scalar(text)


def _scalar(text: str) -> bool | int | float | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
