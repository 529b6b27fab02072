"""quantize-weights: codes under the chosen widths, packed as they will be stored."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from lowra.compiler.capture import fingerprint_of
from lowra.compiler.facts import (
    Codebooks,
    Packed,
    Precision,
    Prefix,
    Statistics,
    TokenWeights,
)
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.progress import stage
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.spill import StoredTensor, write_tensors
from lowra.compiler.storage import from_tensors
from lowra.passes.rounding.guidance import Guides, guides_alone, guides_behind
from lowra.passes.rounding.moments import (
    InputMoments,
    MomentsReader,
    moments_of_prefix,
    output_error,
)
from lowra.passes.rounding.prefix import PrefixStream, prefix_order
from lowra.passes.rounding.quantizer import quantize, quantize_guided

Key = tuple[str, ...]
Facts = dict[str, list[object]]


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantize and pack every site.

    feedback: GPTQ error feedback (arXiv 2210.17323) with each row's own codebook, then scales in
    closed form and coordinate descent on the codes in turn until the row's output error stops
    falling, `rounds` times at most; off, plain rounding to the nearest level.
    prefix: the share of the error in a site's input that the site makes up for (GPTAQ, arXiv
    2504.02692). Above 0, sites are quantized in the order of the graph, each for the inputs that
    the quantized sites before it leave. All of the error (1) is the least-squares answer for the
    site alone, but shrinks what it passes on: of the shares tried at 2 bits, 0.3 gave the model
    the least KL (docs/decisions/0010). At 0, or without a graph or calibration, each site is
    quantized for the original inputs.
    Where measure-sensitivity left token weights, each group of a site's rows is quantized in the
    metric of its own (GuidedQuant, arXiv 2505.07004); the error told is still the plain one.
    Finished sites are kept in the program's spill folder, so an interrupted compile resumes.
    """

    name: ClassVar[str] = "quantize-weights"
    reads: ClassVar = (Rotation, Statistics, Codebooks, Precision)
    writes: ClassVar = (Packed,)
    feedback: bool = True
    rounds: int = 8
    prefix: float = 0.0

    def run(self, program: Program) -> Program:
        ordered: list[tuple[Site, ...]] = []
        alone: Sequence[Site] = program.sites
        if self.feedback and self.prefix > 0:
            ordered, alone = prefix_order(program)
        facts: Facts = {}
        reader = MomentsReader(program)
        guides = guides_alone(program, alone) if self.feedback else {}
        with stage("quantize", len(program.sites)) as bar:
            for site in alone:
                key = self._key(program, site, "")
                guide = guides.get(site.name, ())
                read = functools.partial(self._moments, None if guide else reader, site)
                facts[site.name] = [self._packed(program, site, key, read, guide)]
                bar.advance()
            if ordered:
                facts = self._in_order(program, ordered, facts, bar.advance)
        return program.with_facts(facts)

    def _moments(self, reader: MomentsReader | None, site: Site) -> InputMoments | None:
        return reader.read(site) if self.feedback and reader is not None else None

    def _in_order(
        self, program: Program, groups: Sequence[tuple[Site, ...]], facts: Facts,
        advance: Callable[[], None],
    ) -> Facts:  # fmt: skip
        """Each group quantized behind all before it, in a chain of keys."""
        facts, link = dict(facts), ""
        stream = PrefixStream(program)

        def join(site: Site) -> None:
            nonlocal link
            link = self._key(program, site, link)[-1]
            stream.replace(site, cast("Packed", facts[site.name][0]).weight)

        for name in facts:
            join(program.site(name))
        for group in groups:
            prefix = self._prefix(program, group, link, stream)
            rotation = program.fact(group[0].name, Rotation)
            read = functools.cache(functools.partial(moments_of_prefix, prefix, rotation))
            for site in group:
                key = self._key(program, site, link)
                guide = guides_behind(program, site, prefix.gram, prefix.share)
                facts[site.name] = [self._packed(program, site, key, read, guide), prefix]
                advance()
            for site in group:
                join(site)
        return facts

    def _prefix(
        self, program: Program, group: Sequence[Site], link: str, stream: PrefixStream
    ) -> Prefix:
        """The moments of the input of a group, from the spill folder or measured now."""
        keys = (part for site in group for part in self._key(program, site, link))
        path = program.spill.path("prefix", *keys)
        if not path.exists():
            write_tensors(stream.moments(group[0]), path)
        return Prefix(StoredTensor(path, "gram"), StoredTensor(path, "drift"), self.prefix)

    def _key(self, program: Program, site: Site, link: str) -> Key:
        """What the result of a site depends on, `link` standing for all that went before; the
        last part is a digest of all."""
        guide = program.find(site.name, TokenWeights)
        stored = (program.fact(site.name, Statistics).gram, guide and guide.weights)
        source = " ".join(tensor.path.name for tensor in stored if tensor is not None)
        parts = (repr(self), program.fingerprint, source, _decided(program, site), site.name, link)
        return (*parts, hashlib.sha256("\0".join(parts).encode()).hexdigest())

    def _packed(
        self, program: Program, site: Site, key: Key, read: Callable[[], InputMoments | None],
        guides: Guides,
    ) -> Packed:  # fmt: skip
        stored = program.spill.tensors(key, lambda: self._make(program, site, read(), guides))
        error, energy = stored["error"].tolist()
        group, rotation = (
            program.fact(site.name, Codebooks).group,
            program.fact(site.name, Rotation),
        )
        return Packed(from_tensors(stored, site.n, site.k, group, rotation), error, energy)

    def _make(
        self, program: Program, site: Site, moments: InputMoments | None, guides: Guides
    ) -> dict[str, Tensor]:
        """The packed tensors, and `error`: the share of output energy that rounding lost, and it.

        Behind a prefix the error is against the weight that makes up for the prefix, on the inputs
        that it leaves; the energy is that of the original output.
        """
        rotation = program.fact(site.name, Rotation)
        widths = program.fact(site.name, Precision).row_widths
        weight = rotate(program.weight(site), rotation)
        gram = program.fact(site.name, Statistics).load(site.k)
        energy = output_error(program.weight(site), gram) or 1.0
        target = weight if moments is None else moments.target(weight)
        books = program.fact(site.name, Codebooks)
        if guides:
            packed = quantize_guided(weight, guides, books, widths, rotation, self.rounds)
        else:
            packed = quantize(target, moments, books, widths, rotation, self.rounds)
        if moments is not None and moments.drift is not None:
            lost = moments.loss(target - rotate(packed.dequantize(), rotation))
        else:
            lost = output_error(program.weight(site) - packed.dequantize(), gram)
        return packed.tensors() | {"error": torch.tensor([lost / energy, energy]).double()}


def _decided(program: Program, site: Site) -> str:
    """A hash of everything decided for a site: rotation, codebooks, widths."""
    books = program.fact(site.name, Codebooks)
    decided = {f"levels.{b}": table for b, table in books.levels.items()}
    decided |= {f"scales.{b}": table for b, table in (books.scales or {}).items()}
    decided |= {f"thresholds.{b}": table for b, table in (books.thresholds or {}).items()}
    decided["widths"] = program.fact(site.name, Precision).row_widths
    rotation = program.fact(site.name, Rotation)
    return f"{rotation} {books.group} {books.compact} {fingerprint_of(decided)}"
