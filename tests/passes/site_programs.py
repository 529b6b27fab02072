"""Programs of bare sites, without a model: weights and Gram matrices given by hand."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import lowra.backends.reference  # noqa: F401 - the ops get their meaning
from lowra.compiler.capture import fingerprint_of
from lowra.compiler.facts import Codebooks, Precision, Statistics
from lowra.compiler.packing import levels_of, width_id
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.program import Program, Site
from lowra.compiler.rotation import Rotation, largest_block
from lowra.compiler.spill import Spill, StoredTensor, write_tensors


def site_program(
    weights: Mapping[str, Tensor], grams: Mapping[str, Tensor] | None = None,
    rotated: bool = False, folder: Path | None = None,
) -> Program:  # fmt: skip
    """One site per weight [n, k], with Rotation and Statistics; no gram means data-free."""
    tensors = {f"{name}.weight": weight for name, weight in weights.items()}
    sites = tuple(
        Site(
            name=name, weight=f"{name}.weight", n=weight.shape[0], k=weight.shape[1],
            transposed=False, dtype=weight.dtype, modules=(name,),
        )
        for name, weight in weights.items()
    )  # fmt: skip
    spill = Spill(folder)
    facts: dict[str, list[object]] = {}
    for site in sites:
        statistics = Statistics(None)
        if grams is not None:
            target = StoredTensor(spill.path("gram", site.name), "gram")
            write_tensors({"gram": grams[site.name]}, target.path)
            statistics = Statistics(target, tokens=100)
        rotation = Rotation(0, largest_block(site.k) if rotated else 1)
        facts[site.name] = [rotation, statistics]
    program = Program(
        graph=None, inputs=(), tensors=tensors, weights=(), sites=sites, spill=spill,
        fingerprint=fingerprint_of(tensors), warning="made by hand",
    )  # fmt: skip
    return program.with_facts(facts)


@dataclass(frozen=True)
class CyclicWidths(Pass):
    """Stands in for assign-precision: the fitted widths in turn, row by row."""

    name: ClassVar[str] = "cyclic-widths"
    reads: ClassVar = (Codebooks,)
    writes: ClassVar = (Precision,)

    def run(self, program: Program) -> Program:
        facts: dict[str, list[object]] = {}
        for site in program.sites:
            widths = torch.tensor(program.fact(site.name, Codebooks).ids, dtype=torch.uint8)
            facts[site.name] = [Precision(widths[torch.arange(site.n) % len(widths)])]
        return program.with_facts(facts)


def correlated_gram(k: int, seed: int = 0, strength: float = 2.0) -> Tensor:
    """Gram float32 [k, k] of inputs that share a few directions, as those of a network do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * k, k, generator=generator)
    x += (
        strength
        * torch.randn(4 * k, 3, generator=generator)
        @ torch.randn(3, k, generator=generator)
    )
    return x.T @ x / len(x)


def two_sites(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and grams of two sites of odd sizes, one of them six times as loud."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "up": torch.randn(13, 48, generator=generator),
        "down": 6 * torch.randn(20, 96, generator=generator),
    }
    return weights, {name: correlated_gram(w.shape[1], seed) for name, w in weights.items()}


def compiled(passes: Sequence[Pass], rotated: bool = False) -> Program:
    """The two sites through `passes`; every beginning of a pipeline runs once per test run."""
    return _compiled(tuple(passes), rotated)


@functools.cache
def _compiled(passes: tuple[Pass, ...], rotated: bool) -> Program:
    if not passes:
        return site_program(*two_sites(), rotated=rotated)
    return run_pipeline(_compiled(passes[:-1], rotated), passes[-1:])


def compiled_afresh(passes: Sequence[Pass], rotated: bool = False) -> Program:
    """The same without anything from before."""
    return run_pipeline(site_program(*two_sites(), rotated=rotated), passes)


def with_losses(
    program: Program, losses: Mapping[str, Tensor], widths: tuple[float, ...]
) -> Program:
    """Codebooks that only say what each row loses at each width; -1 group, shared."""
    return program.with_facts(
        {
            site.name: [
                Codebooks(
                    widths,
                    {width: torch.linspace(-1, 1, levels_of(width_id(width))) for width in widths},
                    {width: torch.ones(site.n, 1) for width in widths},
                    losses[site.name].double(), -1, True,
                )
            ]
            for site in program.sites
        }
    )  # fmt: skip


def output_loss(error: Tensor, gram: Tensor) -> float:
    """tr(E G E') in float64."""
    e = error.double()
    return float(torch.trace(e @ gram.double() @ e.T))
