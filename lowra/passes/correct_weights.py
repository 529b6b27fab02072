"""correct-weights: a frozen low-rank correction beside each packed weight, stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from lowra.compiler.correction import Correction
from lowra.compiler.errors import RecipeError
from lowra.compiler.facts import Codebooks, Packed, Precision, Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.storage import ROW_SCALES, PackedWeight, pack_weight
from lowra.passes.rounding.feedback import factorize, feedback_codes
from lowra.passes.rounding.lloyd import fit_shared, gaussian_levels
from lowra.passes.rounding.low_rank import alternate, closed_form
from lowra.passes.rounding.moments import InputMoments, MomentsReader
from lowra.passes.rounding.quantizer import quantize

CORRECTION_BITS = (4, 8)
"""Bits per value that a factor can be stored in."""

REFINEMENTS = 2
"""Rounds of refinement in a requantization, as many as quantize-weights takes."""


@dataclass(frozen=True)
class CorrectWeights(Pass):
    """C = B A of rank `rank` for the error W - W^, its factors stored at `bits` per value.

    The factors are the closed form in the input metric (as initialize-adapters has it; CALDERA,
    arXiv 2405.18886, stores them so too). A is quantized as a weight is, with error feedback; B is
    fit anew to the stored A and then quantized with feedback along the rank, in the metric A G A'.
    `rounds` times the base is quantized anew for W - C and C fit to what is left, where that lowers
    the output error.
    """

    name: ClassVar[str] = "correct-weights"
    reads: ClassVar = (Rotation, Statistics, Codebooks, Precision, Packed)
    writes: ClassVar = (Correction, Packed)
    rank: int = 8
    bits: int = 4
    rounds: int = 1
    feedback: bool = True

    def run(self, program: Program) -> Program:
        if self.rank < 1 or self.bits not in CORRECTION_BITS:
            raise RecipeError(
                f"a correction of rank {self.rank} in {self.bits} bits: the rank must be 1 or more "
                f"and the bits one of {', '.join(map(str, CORRECTION_BITS))}"
            )
        facts: dict[str, list[object]] = {}
        moments = MomentsReader(program)
        with stage("correction", len(program.sites)) as bar:
            for site in program.sites:
                facts[site.name] = self._site(program, site, moments)
                bar.advance()
        return program.with_facts(facts)

    def _site(self, program: Program, site: Site, reader: MomentsReader) -> list[object]:
        weight, packed = program.weight(site), program.fact(site.name, Packed)
        gram = program.fact(site.name, Statistics).load(site.k)
        rotation = program.fact(site.name, Rotation)
        rank = min(self.rank, site.n, site.k)
        fit = partial(
            stored_correction, gram=gram, moments=reader.read(site), rotation=rotation,
            rank=rank, bits=self.bits,
        )  # fmt: skip
        again = partial(requantized, program, site, reader if self.feedback else None)
        split = alternate(weight, gram, packed.weight, fit, again, self.rounds)
        error = split.error / packed.energy
        return [split.part, replace(packed, weight=split.base, error=error)]


def requantized(
    program: Program, site: Site, reader: MomentsReader | None, weight: Tensor
) -> PackedWeight:
    """`weight` [n, k] quantized under the codebooks and widths decided for the site."""
    rotation = program.fact(site.name, Rotation)
    books = program.fact(site.name, Codebooks)
    widths = program.fact(site.name, Precision).row_widths
    moments = None if reader is None else reader.read(site)
    return quantize(rotate(weight, rotation), moments, books, widths, rotation, REFINEMENTS)


def stored_correction(
    error: Tensor, gram: Tensor, moments: InputMoments, rotation: Rotation, rank: int, bits: int
) -> Correction:
    """The correction of rank `rank` for `error` [n, k], as it is stored.

    `gram` is in original coordinates, `moments` in those of `rotation`, which A is stored in.
    """
    _, a = closed_form(error, gram, rank)
    size = a.square().mean(1, keepdim=True).sqrt()
    a = rotate(a / torch.where(size > 0, size, 1.0), rotation)
    widths = torch.full((rank,), bits, dtype=torch.uint8)
    books = _books(a, moments.factor.conditional_variance().unsqueeze(0), bits)
    packed_a = quantize(a, moments, books, widths, rotation, REFINEMENTS)
    stored_a = packed_a.dequantize()
    seen = stored_a @ gram
    metric = seen @ stored_a.T
    b = _least_squares(error @ seen.T, metric)
    return Correction(packed_a, _packed_transposed(b, metric, bits))


def _books(values: Tensor, weights: Tensor, bits: int) -> Codebooks:
    """One codebook for the rows of a factor, and a scale per row, by weighted Lloyd."""
    fit = fit_shared(values, weights, [gaussian_levels(bits)])[0]
    levels, scale = fit.levels.half().float(), fit.scale.half().float().unsqueeze(1)
    loss = fit.loss.unsqueeze(1)
    return Codebooks((bits,), {bits: levels}, {bits: scale}, loss, ROW_SCALES, shared=True)


def _least_squares(product: Tensor, metric: Tensor) -> Tensor:
    """B [n, r] with B metric = product, float32; rows of A that hold nothing get nothing."""
    inverse = torch.linalg.pinv(metric.double(), hermitian=True, rtol=1e-6)
    return (product.double() @ inverse).float()


def _packed_transposed(b: Tensor, metric: Tensor, bits: int) -> PackedWeight:
    """B [n, r] packed as B' [r, n]: codes by error feedback along r, a scale per row of B'."""
    n, rank = b.shape
    columns = b.T.contiguous()
    books = _books(columns, torch.ones(1, 1), bits)
    assert books.scales is not None
    scale = books.scales[bits]
    codes = feedback_codes(
        b, factorize(metric), books.levels[bits].expand(n, -1).contiguous(),
        scale.T.expand(n, -1).contiguous(), 1,
    )  # fmt: skip
    widths = torch.full((rank,), bits, dtype=torch.uint8)
    return pack_weight(codes.T.contiguous(), widths, {bits: books.levels[bits]}, scale, ROW_SCALES)
