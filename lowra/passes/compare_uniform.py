"""compare-uniform: the plan against the best one that gives every row the same width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowra.compiler.capture import fingerprint_of
from lowra.compiler.facts import Assigned, Codebooks, Comparison, Precision, Proof, Statistics
from lowra.compiler.packing import width_id
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.passes.activations import Runner
from lowra.passes.divergence import divergence
from lowra.passes.moments import MomentsReader
from lowra.passes.plan_bits import Counted, plan_bits
from lowra.passes.quantizer import quantize

Widths = Mapping[str, Precision]


@dataclass(frozen=True)
class CompareUniform(Pass):
    """Keep the plan only where it is no worse, on held-out tokens, than the best uniform one.

    Both plans are quantized once with error feedback, for the inputs of the original model, and run
    on the program's held-out batches, which no other pass reads. They are judged by the mean KL
    from the original next-token distribution, or by the relative squared error of the output where
    the model is no causal language model. The widest width that fits the budget for all rows stands
    for the uniform plans, the loss of a row falling with its width. Without a graph or held-out
    data, or where no single width fits, the plan stands, and the report says that nothing was
    compared.
    budget, adapter_rank, correction_rank, correction_bits: as in assign-precision.
    """

    name: ClassVar[str] = "compare-uniform"
    reads: ClassVar = (Rotation, Statistics, Codebooks, Precision, Assigned)
    writes: ClassVar = (Precision, Assigned)
    budget: float = 2.0
    adapter_rank: int = 0
    correction_rank: int = 0
    correction_bits: int = 4

    def run(self, program: Program) -> Program:
        if program.graph is None or not program.held_out:
            return program
        mixed = {site.name: program.fact(site.name, Precision) for site in program.sites}
        found = self._widest(program)
        if found is None:
            return program
        width, uniform = found
        if all(torch.equal(mixed[n].row_widths, uniform[n].row_widths) for n in mixed):
            return program
        with stage("compare", len(program.sites)) as bar:
            key = (repr(self), program.fingerprint, _decided(program, mixed))
            measured = program.spill.tensors(
                key, lambda: {"loss": _measure(program, (mixed, uniform), bar.advance)}
            )["loss"].tolist()
        return self._kept(program, uniform, Comparison(width, *measured))

    def _widest(self, program: Program) -> tuple[float, Widths] | None:
        """The widest width that fits the budget everywhere, and the plan that it makes."""
        budget = int(self.budget * sum(site.weights for site in program.sites))
        for width in sorted(program.fact(program.sites[0].name, Codebooks).widths, reverse=True):
            ids = {s.name: torch.full((s.n,), width_id(width), dtype=torch.uint8)
                   for s in program.sites}  # fmt: skip
            plan = {name: Precision(rows) for name, rows in ids.items()}
            if plan_bits(program, plan, self._counted()) <= budget:
                return width, plan
        return None

    def _counted(self) -> Counted:
        return Counted(self.adapter_rank, self.correction_rank, self.correction_bits)

    def _kept(self, program: Program, uniform: Widths, comparison: Comparison) -> Program:
        """The program with the better plan, and the comparison beside it."""
        facts: dict[str, list[object]] = {}
        for site in program.sites:
            assigned = program.fact(site.name, Assigned)
            facts[site.name] = [replace(assigned, comparison=comparison)]
        if comparison.uniform >= comparison.mixed:
            return program.with_facts(facts)
        losses = {s.name: self._loss(program, s, comparison.width) for s in program.sites}
        bits = plan_bits(program, uniform, self._counted())
        budget = program.fact(program.sites[0].name, Assigned).proof.budget
        proof = Proof(sum(losses.values()), bits, budget)
        return program.with_facts(
            {name: [Assigned(loss, proof, comparison), uniform[name]]
             for name, loss in losses.items()}
        )  # fmt: skip

    def _loss(self, program: Program, site: Site, width: float) -> float:
        books = program.fact(site.name, Codebooks)
        return float(books.loss[:, books.widths.index(width)].sum())


def _decided(program: Program, plan: Widths) -> str:
    """A hash of codebooks and widths of all sites."""
    decided: dict[str, Tensor] = {}
    for site in program.sites:
        books = program.fact(site.name, Codebooks)
        decided |= {f"{site.name}.levels.{b}": table for b, table in books.levels.items()}
        decided |= {f"{site.name}.scales.{b}": s for b, s in (books.scales or {}).items()}
        decided[f"{site.name}.widths"] = plan[site.name].row_widths
    decided |= {f"held out {i} {j}": t for i, b in enumerate(program.held_out)
                for j, t in enumerate(b)}  # fmt: skip
    return fingerprint_of(decided)


def _measure(program: Program, plans: Sequence[Widths], advance: Callable[[], None]) -> Tensor:
    """How far each plan takes the model on the held-out batches: float64 [plans]."""
    models = [dict(program.tensors) for _ in plans]
    reader = MomentsReader(program)
    for site in program.sites:
        rotation = program.fact(site.name, Rotation)
        books = program.fact(site.name, Codebooks)
        weight = rotate(program.weight(site), rotation)
        for tensors, plan in zip(models, plans, strict=True):
            widths = plan[site.name].row_widths
            packed = quantize(weight, reader.read(site), books, widths, rotation)
            rounded = packed.dequantize(site.dtype)
            tensors[site.weight] = rounded.T if site.transposed else rounded
        advance()
    distances = [_distances(program, models, batch) for batch in program.held_out]
    return torch.stack(distances).mean(0)


def _distances(
    program: Program, models: Sequence[Mapping[str, Tensor]], batch: tuple[Tensor, ...]
) -> Tensor:
    """The distance of each model's output from the original one's: float64 [models]."""
    wanted = _output(program, program.tensors, batch)
    return torch.stack([
        _distance(program, wanted, _output(program, tensors, batch)) for tensors in models
    ])  # fmt: skip


def _distance(program: Program, wanted: Tensor, found: Tensor) -> Tensor:
    if program.causal:
        return divergence(found, wanted).double()
    wanted, found = wanted.double(), found.double()
    return ((found - wanted) ** 2).sum() / (wanted**2).sum().clamp_min(1e-300)


def _output(program: Program, tensors: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    assert program.graph is not None
    runner = Runner(program)
    runner.tensors = tensors
    values = {node.name: t for node, t in zip(runner.placeholders, batch, strict=True)}
    *nodes, last = program.graph.nodes
    runner.run(nodes, values, {})
    (result,) = last.all_input_nodes
    return values[result.name]
