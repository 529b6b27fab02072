"""Training end to end: the original model's next tokens, a student, and its best state so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lowra.compiler.errors import CaptureError
from lowra.compiler.program import Program
from lowra.compiler.progress import stage
from lowra.compiler.spill import read_tensors, write_tensors
from lowra.passes.tuning.adam import Adam
from lowra.passes.tuning.batches import (
    data_fingerprint,
    held_out,
    shuffled,
    split_batches,
    tunable_blocks,
)
from lowra.passes.tuning.block_runner import BlockRunner, Linears, Values, run_frozen
from lowra.passes.tuning.divergence import divergence

PATIENCE = 2
"""Checks in a row without a lower held-out KL, after which training stops."""


class Student(Protocol):
    """What is trained, by an Adam that starts at zero, and how the model computes with it."""

    adam: Adam

    def linears(self) -> Linears:
        """The products in place of linear nodes, everything rounded as stored."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What stands in place of the program's own tensors."""
        ...

    def stored(self) -> dict[str, Tensor]:
        """What is stored of the present state, by name."""
        ...


@dataclass(frozen=True)
class Course:
    """How long and how fast a student is trained, and how often it is judged."""

    title: str
    steps: int
    rate: float
    check: int
    seed: int

    def rate_at(self, step: int) -> float:
        """A cosine from the rate to nearly nothing, after a short rise."""
        rise = min(1.0, step / max(1, self.steps // 10))
        return self.rate * rise * 0.5 * (1 + math.cos(math.pi * (step - 1) / self.steps))

    @property
    def checks(self) -> list[int]:
        return [*range(self.check, self.steps, self.check), self.steps]


@dataclass
class _Progress:
    """The best state and its KL, the KL at the start, steps done, checks in a row without gain."""

    best: dict[str, Tensor]
    kl: float
    first: float
    done: int = 0
    waited: int = 0


def require_next_tokens(program: Program, batch_tokens: int) -> None:
    """Raise CaptureError or CalibrationError where a model cannot be trained end to end."""
    tunable_blocks(program)
    split_batches(program, batch_tokens)
    if not program.causal or program.inputs[:1] != ("input_ids",):
        raise CaptureError(
            "tuning a model as a whole follows its next-token distribution, and this model "
            "gives none: use tune='blocks'"
        )


class ModelTraining:
    """One run: KL(original || student) at every position of the calibration windows.

    The original is `program` with its own tensors where others replaced them.
    """

    def __init__(
        self, program: Program, batches: Sequence[tuple[Tensor, ...]], student: Student,
        course: Course,
    ) -> None:  # fmt: skip
        self.program, self.batches = program, batches
        self.student, self.course = student, course
        self.held_out = held_out(len(batches))
        self.runner = BlockRunner(program)
        self.names = list(self.runner.nodes)
        self.stem, self.tail = self._split()

    def _split(self) -> tuple[list[str], list[str]]:
        """Where the original is cut: what stands before is run once, and kept. That is behind the
        last block, or before it where it gives the logits themselves."""
        last = tunable_blocks(self.program)[-1]
        start, end = self.names.index(last.nodes[0]), self.names.index(last.nodes[-1]) + 1
        rest = self.names[end:]
        computes = any(self.runner.nodes[name].op == "call_function" for name in rest)
        cut = end if computes else start
        return self.names[:cut], self.names[cut:]

    def best_of_all(self, state: Path) -> dict[str, Tensor]:
        """Train, or go on from the file `state`, which is renewed at every check.

        What the student stores at its best, with `kl` [before, after]; nothing but `kl` where no
        state was better on the held-out batches than the start.
        """
        course, student = self.course, self.student
        with stage(course.title, course.steps + len(course.checks) + 1) as bar:
            kept = self._original()
            now = self._resumed(state, kept)
            bar.advance(now.done)
            order = shuffled(len(self.batches) - self.held_out, course.steps, course.seed)
            while now.done < course.steps and now.waited < PATIENCE:
                with torch.enable_grad():
                    self._loss(kept, order[now.done]).backward()
                now.done += 1
                student.adam.step(course.rate_at(now.done))
                bar.advance()
                if now.done in course.checks:
                    self._judge(kept, now)
                    self._write(state, now)
                    bar.advance()
        return {**now.best, "kl": torch.tensor([now.first, now.kl], dtype=torch.float64)}

    def _judge(self, kept: Sequence[Values], now: _Progress) -> None:
        """Measure the present state, and keep it if it is the best."""
        kl = self._held_out(kept)
        now.waited = 0 if kl < now.kl else now.waited + 1
        if kl < now.kl:
            now.best, now.kl = self.student.stored(), kl

    def _original(self) -> list[Values]:
        """The original's values at the cut, by batch."""
        own = self.program.replaced
        return [
            run_frozen(self.runner, self.stem, [self.runner.inputs(batch)], tensors=own)[0]
            for batch in self.batches
        ]

    def _loss(self, kept: Sequence[Values], index: int) -> Tensor:
        own = self.program.replaced
        wanted = run_frozen(self.runner, self.tail, [kept[index]], tensors=own)[0]
        found = self.runner.run(
            self.names, self.runner.inputs(self.batches[index]), self.student.linears(),
            self.student.tensors(),
        )  # fmt: skip
        return divergence(self._logits(found), self._logits(wanted))

    def _logits(self, values: Values) -> Tensor:
        """The graph's output."""
        output = self.runner.nodes[self.names[-1]]
        return values[output.all_input_nodes[0].name]

    @torch.no_grad()
    def _held_out(self, kept: Sequence[Values]) -> float:
        """Mean KL over the held-out batches."""
        count = len(self.batches)
        indices = range(count - self.held_out, count)
        return math.fsum(float(self._loss(kept, i)) for i in indices) / len(indices)

    def _resumed(self, state: Path, kept: Sequence[Values]) -> _Progress:
        if not state.exists():
            first = self._held_out(kept)
            return _Progress({}, first, first)
        read = read_tensors(state)
        self.student.adam.load(_under("adam/", read))
        first, kl = read["kl"].tolist()
        done, waited = read["counts"].tolist()
        return _Progress(_under("best/", read), kl, first, done, waited)

    def _write(self, state: Path, now: _Progress) -> None:
        made = {f"adam/{name}": tensor for name, tensor in self.student.adam.state().items()}
        made |= {f"best/{name}": tensor.clone() for name, tensor in now.best.items()}
        made["kl"] = torch.tensor([now.first, now.kl], dtype=torch.float64)
        made["counts"] = torch.tensor([now.done, now.waited])
        write_tensors(made, state)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


class TrainingPass(Protocol):
    """A pass whose fields say how long and how fast a student is trained."""

    name: ClassVar[str]

    @property
    def steps(self) -> int: ...
    @property
    def batch_tokens(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def check(self) -> int: ...
    @property
    def seed(self) -> int: ...


def train(step: TrainingPass, program: Program, student: Student) -> dict[str, Tensor]:
    """The outcome of the training that a pass asks for (`ModelTraining.best_of_all`).

    It is kept in the spill folder and found again there; its state lies beside it.
    """
    batches = split_batches(program, step.batch_tokens)
    path = program.spill.path(repr(step), program.fingerprint, data_fingerprint(program, batches))
    if not path.exists():
        title = step.name.replace("-", " ")
        course = Course(title, step.steps, step.rate, step.check, step.seed)
        state = path.with_suffix(".state")
        training = ModelTraining(program, batches, student, course)
        write_tensors(training.best_of_all(state), path)
        state.unlink(missing_ok=True)
    return read_tensors(path)
