"""quantize-adapters: the LoRA factors of a program as they are packed below 4 bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from lowra.adapters.factors import LowRank
from lowra.adapters.loraquant import LoRAQuant
from lowra.compiler.errors import RecipeError
from lowra.compiler.facts import Adapter, Packed, Statistics
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.passes.budget.adapter_budget import Budget, quantize_sites
from lowra.passes.tune_adapters import judged

BUDGET = "budget"
LORAQUANT = "loraquant"


@dataclass(frozen=True)
class QuantizeAdapters(Pass):
    """Pack the A and B of every Adapter, and put what the packed form stands for in their place.

    method "budget": at most `bits` stored bits per parameter of the whole adapter, spent where they
    help most, one scale per vector (`group` = -1) or per `group` columns. method "loraquant":
    LoRAQuant (arXiv 2510.26690) at `bits`@`rho`; its own group is 128.

    Sites without an adapter stay as they are. What is packed is a fact, PackedSite. A saved
    checkpoint holds plain factors in PEFT's names all the same, with the values of the packed ones:
    `lowra.compress_adapter` on that folder is what stores them packed.
    """

    name: ClassVar[str] = "quantize-adapters"
    reads: ClassVar = (Packed, Statistics)
    writes: ClassVar = ()  # Adapter and PackedSite, for sites that have an adapter
    method: str = BUDGET
    bits: float = 2.0
    rho: float = 0.8
    group: int = -1
    split: str = "paper"
    clip: str = "search"

    def require(self, program: Program) -> None:
        self._chosen()

    def run(self, program: Program) -> Program:
        found = {s: a for s in program.sites if (a := program.find(s.name, Adapter)) is not None}
        adapters = [LowRank(s.name, a.lora_a, a.lora_b, a.scaling) for s, a in found.items()]
        facts: dict[str, list[object]] = {}
        done = quantize_sites(adapters, self._chosen()) if adapters else []
        packed = [quantized.site for quantized in done]
        for (site, adapter), compressed in zip(found.items(), packed, strict=True):
            a, b = (x.to(adapter.lora_a.dtype) for x in compressed.dense())
            anew = judged(program, site, replace(adapter, lora_a=a, lora_b=b))
            facts[site.name] = [anew, compressed]
        return program.with_facts(facts)

    def _chosen(self) -> Budget | LoRAQuant:
        if self.method == BUDGET:
            return Budget(self.bits, self.group)
        if self.method == LORAQUANT:
            return LoRAQuant(self.bits, self.rho, self.group, self.split, self.clip)
        raise RecipeError(f"method is {self.method!r}; give {BUDGET!r} or {LORAQUANT!r}")
