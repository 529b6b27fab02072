"""initialize-adapters: LoRA factors from what quantization lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lowra.compiler.correction import Correction
from lowra.compiler.facts import (
    Adapter,
    AdapterRank,
    Codebooks,
    Packed,
    Precision,
    Prefix,
    Statistics,
)
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate, unrotate
from lowra.compiler.storage import PackedWeight
from lowra.passes.budget.adapter_ranks import check_patterns, parse_ranks, rank_of, scaling_of
from lowra.passes.correct_weights import requantized
from lowra.passes.fit_codebooks import paper_codebooks
from lowra.passes.rounding.low_rank import Factors, alternate, closed_form, two_sided
from lowra.passes.rounding.moments import MomentsReader, moments_of_prefix, output_error
from lowra.passes.rounding.paper_mappings import block_absmax
from lowra.passes.rounding.quantizer import quantize


@dataclass(frozen=True)
class InitializeAdapters(Pass):
    """Choose A [r, k], B [n, r] so that scaling * B A stands for the error E = W - W^.

    rule "closed-form": the rank-r minimum of E|(E - BA) x|^2, from the singular vectors of E L
    with Gram = L L' (QERA, arXiv 2410.06040; CLoQ, arXiv 2501.18475).
    rule "two-sided": the closed form with each output row weighted by its sensitivity D, from the
    singular vectors of D^1/2 E L: the least rise of the model's loss rather than of the output
    error. Where no sensitivities were measured it is the closed form.
    rule "alternate": the closed form, then `rounds` times Q anew for W - BA and the closed form of
    what is left, while the output error with the adapter falls. The packed weights change with it:
    they are made for this adapter, and alone are worse than before.
    rule "loftq": LoftQ (arXiv 2310.08659): `iterations` times, SVD_r of W - Q, then Q requantized
    from W - BA by rounding; the packed weights change with it. The paper's absmax scales follow
    W - BA each time, its mappings and thresholds only under `relearn`, at `threshold_average`.
    rule "zero": B = 0 and A Gaussian, as plain LoRA starts.
    Where a site has a Correction C, W - C stands for W.

    targets: patterns of the sites that get an adapter, by default all. ranks: "pattern=rank"
    entries for the sites that match. alpha 0: each site's own rank. rslora: scaling is
    alpha / sqrt(rank) and not alpha / rank. Raises PatternError for a pattern that matches nothing.
    """

    name: ClassVar[str] = "initialize-adapters"
    reads: ClassVar = (Rotation, Statistics, Codebooks, Precision, Packed)
    writes: ClassVar = (Packed,)  # and Adapter, but for sites to which the planner gave rank 0
    rank: int = 16
    alpha: float = 16.0
    rule: str = "closed-form"
    iterations: int = 5
    rounds: int = 2
    seed: int = 0
    relearn: bool = False
    threshold_average: str = "iterations"
    targets: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    rslora: bool = False

    def require(self, program: Program) -> None:
        names = [site.name for site in program.sites]
        check_patterns(names, self.targets, parse_ranks(self.ranks))

    def run(self, program: Program) -> Program:
        self.require(program)
        facts: dict[str, list[object]] = {}
        moments = MomentsReader(program)
        with stage("adapters", len(program.sites)) as bar:
            for position, site in enumerate(program.sites):
                facts[site.name] = self._site(program, site, position, moments)
                bar.advance()
        return program.with_facts(facts)

    def _site(
        self, program: Program, site: Site, position: int, moments: MomentsReader
    ) -> list[object]:
        asked = self._asked_rank(program, site)
        rank = min(asked, site.n, site.k)
        if not rank:
            return [program.fact(site.name, Packed)]
        scaling = self._scaling(program, site, asked)
        weight, gram = self._goal(program, site)
        packed = program.fact(site.name, Packed)
        residual = weight - packed.weight.dequantize()
        energy = packed.energy
        if self.rule == "loftq":
            base, b, a = self._loftq(program, site, weight, packed.weight, rank)
            residual = weight - base.dequantize()
            packed = replace(packed, weight=base, error=output_error(residual, gram) / energy)
        elif self.rule == "alternate":
            again = partial(requantized, program, site, moments)
            fit = partial(_closed_factors, gram=gram, rank=rank)
            split = alternate(weight, gram, packed.weight, fit, again, self.rounds)
            b, a = split.part.b, split.part.a
            if split.base is not packed.weight:
                residual = weight - split.base.dequantize()
                error = output_error(residual, gram) / energy
                packed = replace(packed, weight=split.base, error=error)
        elif self.rule == "two-sided":
            b, a = two_sided(residual, gram, _row_weights(program, site), rank)
        elif self.rule == "zero":
            b, a = _zero_start(site, rank, self.seed + position)
        else:
            b, a = closed_form(residual, gram, rank)
        root = scaling**0.5
        left = output_error(residual - b @ a, gram) / energy
        return [Adapter(a / root, b / root, scaling, left), packed]

    def _asked_rank(self, program: Program, site: Site) -> int:
        chosen = program.find(site.name, AdapterRank)
        if chosen is not None:
            return chosen.rank
        return rank_of(site.name, self.rank, self.targets, parse_ranks(self.ranks))

    def _scaling(self, program: Program, site: Site, asked: int) -> float:
        """One scaling for all ranks that the planner chooses, so that alpha means one thing; with
        ranks by pattern, and in rsLoRA, each rank's own."""
        one = program.find(site.name, AdapterRank) is not None and not self.rslora
        return scaling_of(self.alpha, self.rank if one else asked, self.rslora)

    def _goal(self, program: Program, site: Site) -> tuple[Tensor, Tensor]:
        """The weight [n, k] that base and adapter stand for together, and the metric of errors.

        Behind a quantized prefix these are what the base was quantized for, so that the adapter
        does not undo what the base makes up for.
        """
        weight = program.weight(site)
        prefix = program.find(site.name, Prefix)
        if prefix is not None and self.rule in ("closed-form", "two-sided", "zero"):
            rotation = program.fact(site.name, Rotation)
            target = moments_of_prefix(prefix, rotation).target(rotate(weight, rotation))
            weight, gram = unrotate(target, rotation), prefix.gram.load()
        else:
            gram = program.fact(site.name, Statistics).load(site.k)
        correction = program.find(site.name, Correction)
        return weight if correction is None else weight - correction.product(), gram

    def _loftq(
        self, program: Program, site: Site, weight: Tensor, base: PackedWeight, rank: int
    ) -> tuple[PackedWeight, Tensor, Tensor]:
        rotation = program.fact(site.name, Rotation)
        books = program.fact(site.name, Codebooks)
        widths = program.fact(site.name, Precision).row_widths
        identity = torch.eye(site.k)
        b, a = closed_form(weight - base.dequantize(), identity, rank)
        for _ in range(self.iterations - 1):
            target = rotate(weight - b @ a, rotation)
            fresh = self._refreshed(books, target)
            base = quantize(target, None, fresh, widths, rotation)
            b, a = closed_form(weight - base.dequantize(), identity, rank)
        return base, b, a

    def _refreshed(self, books: Codebooks, weight: Tensor) -> Codebooks:
        """The paper's codebooks for another weight: absmax anew, and where asked mappings too.

        Codebooks without absmax scales stay as they were fit.
        """
        if books.scales is None or not books.absmax:
            return books
        if self.relearn:
            return paper_codebooks(weight, books.widths, books.group, self.threshold_average)
        absmax = block_absmax(weight, books.group).half().float()
        return replace(books, scales=dict.fromkeys(books.widths, absmax))


def _row_weights(program: Program, site: Site) -> Tensor:
    """Sensitivities [n] of a site's rows, or ones."""
    found = program.fact(site.name, Statistics).sensitivity
    return torch.ones(site.n) if found is None else found.load()


def _closed_factors(error: Tensor, gram: Tensor, rank: int) -> Factors:
    return Factors(*closed_form(error, gram, rank))


def _zero_start(site: Site, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, site.k, generator=generator) / site.k**0.5
    return torch.zeros(site.n, rank), a
