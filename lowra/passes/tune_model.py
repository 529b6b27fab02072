"""tune-model: scales, norms and biases end to end, against the original model's next tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowra.compiler.errors import CaptureError
from lowra.compiler.facts import ModelTuning, Packed, Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation
from lowra.compiler.spill import read_tensors, write_tensors
from lowra.compiler.storage import PackedWeight
from lowra.passes.adam import Adam
from lowra.passes.block_runner import BlockRunner, Product, Values, run_frozen
from lowra.passes.divergence import divergence
from lowra.passes.moments import output_error
from lowra.passes.panels import rotated_values, scaled
from lowra.passes.tuning import (
    data_fingerprint,
    held_out,
    shuffled,
    split_batches,
    tunable_blocks,
    with_tensors,
)

PATIENCE = 2
"""Checks in a row without a lower held-out KL, after which training stops."""


@dataclass(frozen=True)
class TuneModel(Pass):
    """Train one factor per output row and every norm and bias, codes and levels fixed.

    The loss is KL(original || model) at every position of the calibration windows, the way
    EfficientQAT (arXiv 2407.11062) ends. Every `check` steps it is measured on held-out batches,
    with everything rounded as stored; the best state is kept, the start included, and training
    stops when two checks in a row are no better. `rate` is Adam's: relative, per step. The state is
    written to the spill folder at every check, so that an interrupted run goes on.
    """

    name: ClassVar[str] = "tune-model"
    reads: ClassVar = (Rotation, Statistics, Packed)
    writes: ClassVar = (Packed, ModelTuning)
    steps: int = 64
    batch_tokens: int = 1024
    rate: float = 0.002
    check: int = 16
    seed: int = 0

    def require(self, program: Program) -> None:
        tunable_blocks(program)
        split_batches(program, self.batch_tokens)
        if not program.causal or program.inputs[:1] != ("input_ids",):
            raise CaptureError(
                "tuning a model as a whole follows its next-token distribution, and this model "
                "gives none: use tune='blocks'"
            )

    def run(self, program: Program) -> Program:
        self.require(program)
        batches = split_batches(program, self.batch_tokens)
        path = program.spill.path(
            repr(self), program.fingerprint, data_fingerprint(program, batches)
        )
        if not path.exists():
            training = _Training(self, program, batches)
            write_tensors(training.best_of_all(path.with_suffix(".state")), path)
        return _with_tuned(program, read_tensors(path))


class _Training:
    """A run of TuneModel: the original's states, the student, what is best so far."""

    def __init__(
        self, step: TuneModel, program: Program, batches: Sequence[tuple[Tensor, ...]]
    ) -> None:
        self.step, self.program, self.batches = step, program, batches
        self.held_out = held_out(len(batches))
        self.runner = BlockRunner(program)
        self.names = list(self.runner.nodes)
        self.student = _Student(program, self.runner)
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

    def best_of_all(self, state: Any) -> dict[str, Tensor]:
        """Train, or go on from `state`; factors by `factor/site`, tensors by `tensor/name`, and
        `kl` [before, after]."""
        step, student = self.step, self.student
        checks = [*range(step.check, step.steps, step.check), step.steps]
        with stage("tune model", step.steps + len(checks) + 1) as bar:
            kept = self._original()
            best, done, first, waited = self._resumed(state, kept)
            bar.advance(done)
            order = shuffled(len(self.batches) - self.held_out, step.steps, step.seed)
            for number in range(done + 1, step.steps + 1):
                with torch.enable_grad():
                    self._loss(kept, order[number - 1]).backward()
                student.adam.step(step.rate * _schedule(number, step.steps))
                bar.advance()
                if number not in checks:
                    continue
                now = self._held_out(kept)
                better = now < float(best["kl"])
                waited = 0 if better else waited + 1
                if better:
                    best = {**student.stored(), "kl": torch.tensor(now, dtype=torch.float64)}
                self._write(state, best, number, first, waited)
                bar.advance()
                if waited == PATIENCE:
                    break
        state.unlink(missing_ok=True)
        return {**best, "kl": torch.stack((first, best["kl"]))}

    def _original(self) -> list[Values]:
        """The original's values at the cut, by batch."""
        own = self.program.replaced
        return [
            run_frozen(self.runner, self.stem, [self.runner.inputs(batch)], tensors=own)[0]
            for batch in self.batches
        ]

    def _logits(self, kept: Sequence[Values], index: int) -> Tensor:
        own = self.program.replaced
        return _last(run_frozen(self.runner, self.tail, [kept[index]], tensors=own)[0], self.runner)

    def _loss(self, kept: Sequence[Values], index: int) -> Tensor:
        wanted = self._logits(kept, index)
        found = self.student.run(self.names, self.runner.inputs(self.batches[index]))
        return divergence(found, wanted)

    @torch.no_grad()
    def _held_out(self, kept: Sequence[Values]) -> float:
        """Mean KL over the held-out batches, everything rounded as stored."""
        count = len(self.batches)
        total: list[float] = []
        for index in range(count - self.held_out, count):
            total.append(float(self._loss(kept, index)))
        return math.fsum(total) / len(total)

    def _resumed(
        self, state: Any, kept: Sequence[Values]
    ) -> tuple[dict[str, Tensor], int, Tensor, int]:
        """What is best, steps done, KL at the start, checks without gain."""
        if state.exists():
            read = read_tensors(state)
            self.student.adam.load({n[5:]: t for n, t in read.items() if n.startswith("adam/")})
            best = {n[5:]: t for n, t in read.items() if n.startswith("best/")}
            return best, int(read["done"]), read["first"], int(read["waited"])
        first = torch.tensor(self._held_out(kept), dtype=torch.float64)
        return {**self.student.stored(), "kl": first}, 0, first, 0

    def _write(
        self, state: Any, best: Mapping[str, Tensor], done: int, first: Tensor, waited: int
    ) -> None:
        made = {f"adam/{name}": tensor for name, tensor in self.student.adam.state().items()}
        made |= {f"best/{name}": tensor.clone() for name, tensor in best.items()}
        made |= {
            "done": torch.tensor(done), "first": first.clone(), "waited": torch.tensor(waited)
        }  # fmt: skip
        write_tensors(made, state)


def _last(values: Values, runner: BlockRunner) -> Tensor:
    """The graph's output."""
    output = list(runner.nodes.values())[-1]
    return values[output.all_input_nodes[0].name]


def _schedule(step: int, steps: int) -> float:
    """A cosine from one to nearly nothing, after a short rise."""
    rise = min(1.0, step / max(1, steps // 10))
    return rise * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


class _Student:
    """The quantized model in training: a factor per row, and the one-dimensional parameters."""

    def __init__(self, program: Program, runner: BlockRunner) -> None:
        self.program, self.runner = program, runner
        reads = {str(n.target) for n in runner.nodes.values() if n.op == "get_attr"}
        self.starts = {
            name: tensor.detach().float()
            for name, tensor in program.tensors.items()
            if name in reads and isinstance(tensor, nn.Parameter) and tensor.dim() == 1
        }
        self.units = {n: t.square().mean().sqrt().clamp_min(1e-3) for n, t in self.starts.items()}
        shapes = {f"tensor/{name}": tensor.shape for name, tensor in self.starts.items()}
        shapes |= {f"factor/{site.name}": torch.Size((site.n,)) for site in program.sites}
        self.adam = Adam(shapes)

    def tensors(self) -> dict[str, Tensor]:
        old, values = self.program.tensors, self.adam.values
        return {
            name: (start + self.units[name] * values[f"tensor/{name}"]).to(old[name].dtype)
            for name, start in self.starts.items()
        }

    def run(self, names: Sequence[str], values: Values) -> Tensor:
        linears: dict[str, tuple[Product, Rotation]] = {}
        for site in self.program.sites:
            packed = self.program.fact(site.name, Packed).weight
            factor = 1 + self.adam.values[f"factor/{site.name}"]
            pair = (_scaled_product(packed, factor), packed.rotation)
            linears |= dict.fromkeys(site.nodes, pair)
        return _last(self.runner.run(names, values, linears, self.tensors()), self.runner)

    def stored(self) -> dict[str, Tensor]:
        """Factors by `factor/site` and tensors by `tensor/name`, as they are now."""
        values = self.adam.values
        made = {n: 1 + t.detach() for n, t in values.items() if n.startswith("factor/")}
        return made | {f"tensor/{name}": t.detach() for name, t in self.tensors().items()}


class _PackedProduct(torch.autograd.Function):
    """x [..., k] -> x W', rows of W times their factor [n], everything rounded as stored.

    The weight is unpacked for the product and once more for its gradient. A factor's gradient is
    that of its output's size, sum of g y / factor: no gradient of the weight is formed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, packed: PackedWeight) -> Tensor:
        ctx.packed = scaled(packed, factor)
        y = functional.linear(x, rotated_values(ctx.packed, x.dtype))
        ctx.save_for_backward(factor, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        factor, y = ctx.saved_tensors
        size = (grads[0].float() * y.float()).flatten(0, -2).sum(0)
        weight = rotated_values(ctx.packed, grads[0].dtype)
        return grads[0] @ weight, size / factor, None


def _scaled_product(packed: PackedWeight, factor: Tensor) -> Product:
    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        y: Any = _PackedProduct.apply(x, factor, packed)
        return y if bias is None else y + bias

    return multiply


def _with_tuned(program: Program, tuned: Mapping[str, Tensor]) -> Program:
    before, after = tuned["kl"].tolist()
    facts: dict[str, list[object]] = {}
    for site in program.sites:
        old = program.fact(site.name, Packed)
        packed = scaled(old.weight, tuned[f"factor/{site.name}"])
        gram = program.fact(site.name, Statistics).load(site.k)
        left = output_error(program.weight(site) - packed.dequantize(), gram)
        facts[site.name] = [
            replace(old, weight=packed, error=left / old.energy), ModelTuning(before, after)
        ]  # fmt: skip
    changed = {n.removeprefix("tensor/"): t for n, t in tuned.items() if n.startswith("tensor/")}
    return with_tensors(program, changed).with_facts(facts)
