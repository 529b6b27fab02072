"""quantize-weights: codes under the chosen widths, packed as they will be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowra.compiler.capture import fingerprint_of
from lowra.compiler.facts import Codebooks, Packed, Precision, Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.storage import PackedWeight, from_tensors
from lowra.passes.moments import MomentsReader
from lowra.passes.quantizer import output_error, quantize


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize and pack every site.

    feedback: GPTQ error feedback (arXiv 2210.17323) with each row's own codebook, then scales in
    closed form and coordinate descent on the codes in turn, `rounds` times; off, plain rounding to
    the nearest level. Finished sites are kept in
    the program's spill folder, so an interrupted compile resumes.
    """

    name: ClassVar[str] = "quantize-weights"
    reads: ClassVar = (Rotation, Statistics, Codebooks, Precision)
    writes: ClassVar = (Packed,)
    feedback: bool = True
    rounds: int = 2

    def run(self, program: Program) -> Program:
        facts: dict[str, list[object]] = {}
        moments = MomentsReader(program)
        with stage("quantize", len(program.sites)) as bar:
            for site in program.sites:
                facts[site.name] = [self._quantize(program, site, moments)]
                bar.advance()
        return program.with_facts(facts)

    def _quantize(self, program: Program, site: Site, moments: MomentsReader) -> Packed:
        rotation = program.fact(site.name, Rotation)
        statistics = program.fact(site.name, Statistics)
        source = "" if statistics.gram is None else statistics.gram.path.name
        key = (repr(self), program.fingerprint, source, _digest(program, site), site.name)
        stored = program.spill.tensors(key, lambda: self._make(program, site, moments).tensors())
        group = program.fact(site.name, Codebooks).group
        packed = from_tensors(stored, site.n, site.k, group, rotation)
        gram = statistics.load(site.k)
        weight = program.weight(site)
        energy = output_error(weight, gram) or 1.0
        return Packed(packed, output_error(weight - packed.dequantize(), gram) / energy, energy)

    def _make(self, program: Program, site: Site, moments: MomentsReader) -> PackedWeight:
        rotation = program.fact(site.name, Rotation)
        books = program.fact(site.name, Codebooks)
        precision = program.fact(site.name, Precision)
        weight = rotate(program.weight(site), rotation)
        read = moments.read(site) if self.feedback else None
        return quantize(weight, read, books, precision.row_widths, rotation, self.rounds)


def _digest(program: Program, site: Site) -> str:
    """A hash of everything decided for a site: rotation, codebooks, widths."""
    books = program.fact(site.name, Codebooks)
    decided = {f"levels.{b}": table for b, table in books.levels.items()}
    decided |= {f"scales.{b}": table for b, table in (books.scales or {}).items()}
    decided["widths"] = program.fact(site.name, Precision).row_widths
    rotation = program.fact(site.name, Rotation)
    return f"{rotation} {books.group} {fingerprint_of(decided)}"
