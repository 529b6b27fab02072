"""initialize-adapters: LoRA factors from what quantization lost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowra.compiler.facts import Adapter, AdapterRank, Codebooks, Packed, Precision, Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.storage import PackedWeight
from lowra.passes.feedback import DAMPING, scale_index
from lowra.passes.moments import output_error
from lowra.passes.quantizer import quantize


@dataclass(frozen=True)
class InitializeAdapters(Pass):
    """Choose A [r, k], B [n, r] so that scaling * B A stands for the error E = W - W^.

    rule "closed-form": the rank-r minimum of E|(E - BA) x|^2, from the singular vectors of E L
    with Gram = L L' (QERA, arXiv 2410.06040; CLoQ, arXiv 2501.18475).
    rule "loftq": LoftQ (arXiv 2310.08659): `iterations` times, SVD_r of W - Q, then Q requantized
    from W - BA by rounding; the packed weights change with it.
    rule "zero": B = 0 and A Gaussian, as plain LoRA starts.
    """

    name: ClassVar[str] = "initialize-adapters"
    reads: ClassVar = (Rotation, Statistics, Codebooks, Precision, Packed)
    writes: ClassVar = (Packed,)  # and Adapter, but for sites to which the planner gave rank 0
    rank: int = 16
    alpha: float = 16.0
    rule: str = "closed-form"
    iterations: int = 5
    seed: int = 0

    def run(self, program: Program) -> Program:
        facts: dict[str, list[object]] = {}
        with stage("adapters", len(program.sites)) as bar:
            for position, site in enumerate(program.sites):
                facts[site.name] = self._site(program, site, position)
                bar.advance()
        return program.with_facts(facts)

    def _site(self, program: Program, site: Site, position: int) -> list[object]:
        chosen = program.find(site.name, AdapterRank)
        rank = min(self.rank if chosen is None else chosen.rank, site.n, site.k)
        if not rank:
            return [program.fact(site.name, Packed)]
        scaling = self.alpha / self.rank
        weight = program.weight(site)
        gram = program.fact(site.name, Statistics).load(site.k)
        packed = program.fact(site.name, Packed)
        residual = weight - packed.weight.dequantize()
        energy = packed.energy
        if self.rule == "loftq":
            base, b, a = self._loftq(program, site, weight, packed.weight, rank)
            residual = weight - base.dequantize()
            packed = replace(packed, weight=base, error=output_error(residual, gram) / energy)
        elif self.rule == "zero":
            b, a = _zero_start(site, rank, self.seed + position)
        else:
            b, a = closed_form(residual, gram, rank)
        root = scaling**0.5
        left = output_error(residual - b @ a, gram) / energy
        return [Adapter(a / root, b / root, scaling, left), packed]

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
            fresh = _rescaled(books, target)
            base = quantize(target, None, fresh, widths, rotation)
            b, a = closed_form(weight - base.dequantize(), identity, rank)
        return base, b, a


def closed_form(error: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [n, r], A [r, k] float32 minimising tr((E - BA) G (E - BA)') for E [n, k].

    With M = E L, G = L L', M = U S V': B = U_r sqrt(S_r), A = sqrt(S_r) V_r' L^-1. The singular
    vectors come from the symmetric eigenproblem of the smaller side, in float64; for n <= k that
    is M M' = E G E' and V_r' L^-1 = S_r^-1 U_r' E, so G is not factored.
    """
    n, k = error.shape
    e, g = error.double(), gram.double()
    g = g + torch.eye(k, dtype=g.dtype) * (DAMPING * (float(g.diagonal().mean()) or 1.0))
    if n <= k:
        squares, u = _largest(e @ g @ e.T, rank)
        sizes = squares.clamp_min(0).sqrt()
        coefficients = u.T @ e
    else:
        lower = torch.linalg.cholesky(g)
        m = e @ lower
        v = _largest(m.T @ m, rank)[1]
        image = m @ v
        sizes = image.norm(dim=0)
        u = image / sizes.clamp_min(1e-30)
        right = torch.linalg.solve_triangular(lower, v.T.contiguous(), upper=False, left=False)
        coefficients = sizes[:, None] * right
    root = sizes.clamp_min(1e-30).sqrt()
    live = (sizes > 1e-12 * sizes.max().clamp_min(1e-300)).double()
    return (u * (root * live)).float(), (coefficients / root[:, None] * live[:, None]).float()


def _largest(square: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues [r] and eigenvectors [k, r] of a symmetric float64 [k, k].

    Solved in float32, in half the time: a vector's error costs its square in captured energy.
    """
    size = float(square.diagonal().mean()) or 1.0
    values, vectors = torch.linalg.eigh((square / size).float())
    return values[-rank:].flip(0).double() * size, vectors[:, -rank:].flip(1).double()


def _rescaled(books: Codebooks, weight: Tensor) -> Codebooks:
    """The codebooks with absmax scales taken anew from `weight`; others stay as they were fit."""
    if books.scales is None or not books.absmax:
        return books
    index = scale_index(weight.shape[1], books.group)
    absmax = torch.zeros(weight.shape[0], int(index[-1]) + 1)
    absmax.scatter_reduce_(1, index.expand_as(weight), weight.abs(), "amax")
    return replace(books, scales=dict.fromkeys(books.widths, absmax.half().float()))


def _zero_start(site: Site, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, site.k, generator=generator) / site.k**0.5
    return torch.zeros(site.n, rank), a
