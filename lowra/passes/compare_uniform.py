"""compare-uniform: the plan against the best one that gives every row the same width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowra.compiler.capture import fingerprint_of
from lowra.compiler.facts import (
    Assigned,
    Codebooks,
    Comparison,
    LayoutFits,
    Precision,
    Proof,
    Statistics,
)
from lowra.compiler.layout import Layout
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.storage import PackedWeight
from lowra.passes.budget.plan_bits import Counted, plan_bits
from lowra.passes.rounding.activations import Runner
from lowra.passes.rounding.moments import MomentsReader
from lowra.passes.rounding.quantizer import quantize
from lowra.passes.rounding.stored_books import in_layouts
from lowra.passes.tuning.divergence import divergence


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
    writes: ClassVar = (Codebooks, Precision, Assigned)
    budget: float = 2.0
    adapter_rank: int = 0
    correction_rank: int = 0
    correction_bits: int = 4

    def run(self, program: Program) -> Program:
        if program.graph is None or not program.held_out:
            return program
        found = self._rival(program)
        if found is None or _alike(program, found[1]):
            return program
        width, uniform = found
        with stage("compare", len(program.sites)) as bar:
            key = (repr(self), program.fingerprint, _decided(program), _decided(uniform))
            measured = program.spill.tensors(
                key, lambda: {"loss": _measure(program, (program, uniform), bar.advance)}
            )["loss"].tolist()
        return self._kept(program, uniform, Comparison(width, *measured))

    def _rival(self, program: Program) -> tuple[float, Program] | None:
        """The widest width that fits the budget everywhere, and the program with that plan."""
        best: tuple[float, float, Program] | None = None
        for layout in _layouts(program):
            plan = program if layout is None else in_layouts(program, layout)
            width = self._widest(plan)
            if width is None:
                continue
            loss = sum(_loss(plan, site, width) for site in plan.sites)
            if best is None or (-width, loss) < (-best[0], best[1]):
                best = width, loss, _uniform(plan, width)
        return None if best is None else (best[0], best[2])

    def _widest(self, program: Program) -> float | None:
        budget = int(self.budget * sum(site.weights for site in program.sites))
        for width in sorted(program.fact(program.sites[0].name, Codebooks).widths, reverse=True):
            if plan_bits(program, _plan(_uniform(program, width)), self._counted()) <= budget:
                return width
        return None

    def _counted(self) -> Counted:
        return Counted(self.adapter_rank, self.correction_rank, self.correction_bits)

    def _kept(self, program: Program, uniform: Program, comparison: Comparison) -> Program:
        """The better of the two programs, and the comparison beside its plan."""
        found = {site.name: program.fact(site.name, Assigned) for site in program.sites}
        if comparison.uniform >= comparison.mixed:
            return program.with_facts(
                {name: [replace(assigned, comparison=comparison)]
                 for name, assigned in found.items()}
            )  # fmt: skip
        losses = {s.name: _loss(uniform, s, comparison.width) for s in uniform.sites}
        bits = plan_bits(uniform, _plan(uniform), self._counted())
        budget = found[program.sites[0].name].proof.budget
        proof = Proof(sum(losses.values()), bits, budget)
        return uniform.with_facts(
            {name: [Assigned(loss, proof, comparison)] for name, loss in losses.items()}
        )


def _layouts(program: Program) -> list[dict[str, Layout] | None]:
    """Each layout that sites could choose, for all of them; None is the only one that there is."""
    fits = program.find(program.sites[0].name, LayoutFits)
    if fits is None:
        return [None]
    return [{site.name: layout for site in program.sites} for layout in fits.files]


def _uniform(program: Program, width: float) -> Program:
    """The program with one width for all rows."""
    facts: dict[str, list[object]] = {}
    for site in program.sites:
        id = program.fact(site.name, Codebooks).layout.width_id(width)
        facts[site.name] = [Precision(torch.full((site.n,), id, dtype=torch.uint8))]
    return program.with_facts(facts)


def _plan(program: Program) -> dict[str, Precision]:
    return {site.name: program.fact(site.name, Precision) for site in program.sites}


def _alike(program: Program, other: Program) -> bool:
    """True where all rows have the same widths and all sites the same layout."""
    return all(
        program.fact(s.name, Codebooks).layout == other.fact(s.name, Codebooks).layout
        and torch.equal(
            program.fact(s.name, Precision).row_widths, other.fact(s.name, Precision).row_widths
        )
        for s in program.sites
    )


def _loss(program: Program, site: Site, width: float) -> float:
    books = program.fact(site.name, Codebooks)
    return float(books.loss[:, books.widths.index(width)].sum())


def _decided(program: Program) -> str:
    """A hash of codebooks and widths of all sites, and what they are judged on."""
    decided: dict[str, Tensor] = {}
    for site in program.sites:
        books = program.fact(site.name, Codebooks)
        decided |= {f"{site.name}.levels.{b}": table for b, table in books.levels.items()}
        decided |= {f"{site.name}.scales.{b}": s for b, s in (books.scales or {}).items()}
        decided[f"{site.name}.widths"] = program.fact(site.name, Precision).row_widths
    decided |= {f"held out {i} {j}": t for i, b in enumerate(program.held_out)
                for j, t in enumerate(b)}  # fmt: skip
    return fingerprint_of(decided)


def _measure(program: Program, plans: Sequence[Program], advance: Callable[[], None]) -> Tensor:
    """How far the plans take the model on the held-out batches: float64 [plans]."""
    packed: list[dict[str, PackedWeight]] = [{} for _ in plans]
    reader = MomentsReader(program)
    for site in program.sites:
        rotation = program.fact(site.name, Rotation)
        weight = rotate(program.weight(site), rotation)
        for made, plan in zip(packed, plans, strict=True):
            books = plan.fact(site.name, Codebooks)
            widths = plan.fact(site.name, Precision).row_widths
            made[site.name] = quantize(weight, reader.read(site), books, widths, rotation)
        advance()
    wanted = [_output(program, program.tensors, batch) for batch in program.held_out]
    return torch.stack([_far(program, made, wanted) for made in packed])


def _far(program: Program, packed: Mapping[str, PackedWeight], wanted: Sequence[Tensor]) -> Tensor:
    """The mean distance of the model on packed weights from the original's outputs `wanted`:
    float64."""
    tensors = _Unpacked(program, packed)
    distances = [
        _distance(program, output, _output(program, tensors, batch))
        for output, batch in zip(wanted, program.held_out, strict=True)
    ]
    return torch.stack(distances).mean()


class _Unpacked(Mapping[str, Tensor]):
    """The program's tensors, with dense copies of packed weights made anew wherever one is read."""

    def __init__(self, program: Program, packed: Mapping[str, PackedWeight]) -> None:
        self._tensors = program.tensors
        self._sites = {site.weight: (site, packed[site.name]) for site in program.sites}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._sites:
            return self._tensors[name]
        site, weight = self._sites[name]
        rounded = weight.dequantize(site.dtype)
        return rounded.T if site.transposed else rounded

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


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
