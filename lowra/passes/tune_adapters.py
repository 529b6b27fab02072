"""tune-adapters: A and B end to end on a frozen base, against the original's next tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lowra.compiler.correction import Correction
from lowra.compiler.facts import Adapter, AdapterTuning, Packed, Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.rotation import Rotation, rotate
from lowra.passes.rounding.moments import output_error
from lowra.passes.tuning.adam import Adam
from lowra.passes.tuning.block_runner import Linears, Product
from lowra.passes.tuning.model_training import require_next_tokens, train
from lowra.passes.tuning.packed_product import packed_product


@dataclass(frozen=True)
class TuneAdapters(Pass):
    """Train A and B of every site by KL(original || model), the base frozen.

    It comes last, behind initialize-adapters. Trained together with the base, the two would only
    stand for the model together; but an adapter is switched off, swapped, and trained on, and the
    base has to be good without it (tune-model). A closed form sees one layer; the loss of the
    model makes better use of a low rank at 2 bits (RILQ, arXiv 2412.01129). It is judged, kept,
    stopped and resumed as tune-model is, with the base as it is stored and A and B rounded to the
    model's dtype. `rate` is Adam's, per step, relative to the root mean square of each factor.
    """

    name: ClassVar[str] = "tune-adapters"
    reads: ClassVar = (Rotation, Statistics, Packed)
    writes: ClassVar = (AdapterTuning,)  # and Adapter, where there was one
    steps: int = 64
    batch_tokens: int = 1024
    rate: float = 0.005
    check: int = 16
    seed: int = 0

    def require(self, program: Program) -> None:
        require_next_tokens(program, self.batch_tokens)

    def run(self, program: Program) -> Program:
        self.require(program)
        return _with_tuned(program, train(self, program, _Student(program)))


class _Factors:
    """A [r, k] and B [n, r] of one site in training."""

    def __init__(self, site: Site, adapter: Adapter, adam: Adam) -> None:
        self.site, self.scaling, self.values = site, adapter.scaling, adam.values
        self.starts = dict(zip(_names(site), (adapter.lora_a, adapter.lora_b), strict=True))

    def moved(self) -> tuple[Tensor, Tensor]:
        """float32, in original coordinates."""
        a, b = (start + _size(start) * self.values[name] for name, start in self.starts.items())
        return a, b

    def term(self, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """A for rotated inputs, and scaling * B, rounded to the dtype they are kept in."""
        a, b = (factor.to(self.site.dtype) for factor in self.moved())
        return rotate(a.float(), rotation).to(a.dtype), self.scaling * b


class _Student:
    """Frozen packed weights, with their corrections if any, and the adapters in training."""

    def __init__(self, program: Program) -> None:
        self.program = program
        found = [(s, a) for s in program.sites if (a := program.find(s.name, Adapter))]
        shapes: dict[str, torch.Size] = {}
        for site, adapter in found:
            shapes |= dict(
                zip(_names(site), (adapter.lora_a.shape, adapter.lora_b.shape), strict=True)
            )
        self.adam = Adam(shapes)
        self.factors = {s.name: _Factors(s, adapter, self.adam) for s, adapter in found}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def linears(self) -> Linears:
        made: dict[str, tuple[Product, Rotation]] = {}
        for site in self.program.sites:
            rotation = self.program.fact(site.name, Packed).weight.rotation
            made |= dict.fromkeys(site.nodes, (self._product(site, rotation), rotation))
        return made

    def _product(self, site: Site, rotation: Rotation) -> Product:
        packed = self.program.fact(site.name, Packed).weight
        terms = self._correction(site, rotation)
        if site.name in self.factors:
            terms.append(self.factors[site.name].term(rotation))

        def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
            y = packed_product(x, packed.codebooks, packed.scales, packed)
            for a, b in terms:
                y = y + functional.linear(functional.linear(x, a), b)
            return y if bias is None else y + bias

        return multiply

    def _correction(self, site: Site, rotation: Rotation) -> list[tuple[Tensor, Tensor]]:
        found = self.program.find(site.name, Correction)
        if found is None:
            return []
        a = rotate(found.a.dequantize(), rotation).to(site.dtype)
        return [(a, found.b.dequantize(site.dtype).T)]

    def stored(self) -> dict[str, Tensor]:
        """`lora_A/site` and `lora_B/site`."""
        made: dict[str, Tensor] = {}
        for factors in self.factors.values():
            pair = (factor.detach() for factor in factors.moved())
            made |= dict(zip(factors.starts, pair, strict=True))
        return made


def _names(site: Site) -> tuple[str, str]:
    return f"lora_A/{site.name}", f"lora_B/{site.name}"


def _size(start: Tensor) -> Tensor:
    """The root mean square of a factor; that of a common one where it starts at zero."""
    size = start.square().mean().sqrt()
    return torch.where(size > 0, size, 1e-2)


def _with_tuned(program: Program, tuned: Mapping[str, Tensor]) -> Program:
    outcome = AdapterTuning(*tuned["kl"].tolist())
    facts: dict[str, list[object]] = {site.name: [outcome] for site in program.sites}
    for site in program.sites:
        old = program.find(site.name, Adapter)
        a, b = (tuned.get(name) for name in _names(site))
        if old is not None and a is not None and b is not None:
            facts[site.name].append(judged(program, site, replace(old, lora_a=a, lora_b=b)))
    return program.with_facts(facts)


def judged(program: Program, site: Site, adapter: Adapter) -> Adapter:
    """With the output error on the original's inputs, as tuned weights have it."""
    packed = program.fact(site.name, Packed)
    left = program.weight(site) - packed.weight.dequantize()
    left -= adapter.scaling * adapter.lora_b @ adapter.lora_a
    if correction := program.find(site.name, Correction):
        left -= correction.product()
    gram = program.fact(site.name, Statistics).load(site.k)
    return replace(adapter, error=output_error(left, gram) / packed.energy)
