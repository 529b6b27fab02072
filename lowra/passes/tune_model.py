"""tune-model: codebooks, scales, norms and biases end to end, by KL against the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowra.compiler.facts import ModelTuning, Packed, Statistics
from lowra.compiler.levels import ascending, spacings
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import PackedWeight, with_tables
from lowra.passes.rounding.moments import output_error
from lowra.passes.tuning.adam import Adam
from lowra.passes.tuning.batches import with_tensors
from lowra.passes.tuning.block_runner import Linears, Product
from lowra.passes.tuning.model_training import require_next_tokens, train
from lowra.passes.tuning.packed_product import packed_product


@dataclass(frozen=True)
class TuneModel(Pass):
    """Train every codebook value, scale, norm and bias, codes fixed.

    The loss is KL(original || model) at every position of the calibration windows, the way
    EfficientQAT (arXiv 2407.11062) ends; that trains scales alone, this the levels too. Every
    `check` steps it is measured on held-out batches, with everything rounded as stored; the best
    state is kept, the start included, and training stops when two checks in a row are no better.
    `rate` is Adam's, per step: of a scale relative to it, of a level in distances between levels.
    The state is written to the spill folder at every check, so that an interrupted run goes on.

    Adapters do not exist yet: the base is made to stand alone, as a base does that serves other
    adapters or none. What is left to them is for initialize-adapters and tune-adapters.
    """

    name: ClassVar[str] = "tune-model"
    reads: ClassVar = (Rotation, Statistics, Packed)
    writes: ClassVar = (Packed, ModelTuning)
    steps: int = 64
    batch_tokens: int = 1024
    rate: float = 0.002
    check: int = 16
    seed: int = 0

    def require(self, program: Program) -> None:
        require_next_tokens(program, self.batch_tokens)

    def run(self, program: Program) -> Program:
        self.require(program)
        return _with_tuned(program, train(self, program, _Student(program)))


class _Tables:
    """The codebooks and scales of one site in training, flat and in stored order."""

    def __init__(self, site: Site, packed: PackedWeight, adam: Adam) -> None:
        self.site, self.packed, self.values = site, packed, adam.values
        self.units = spacings(packed)

    @staticmethod
    def shapes(site: Site, packed: PackedWeight) -> dict[str, torch.Size]:
        made = {f"codebooks/{site.name}": packed.codebooks.shape}
        if packed.scales is not None:
            made[f"scales/{site.name}"] = packed.scales.shape
        return made

    def moved(self) -> tuple[Tensor, Tensor | None]:
        offset = self.values[f"codebooks/{self.site.name}"]
        moved = self.packed.codebooks.float() + self.units * offset
        codebooks = ascending(self.packed, moved)
        if self.packed.scales is None:
            return codebooks, None
        factor = (1 + self.values[f"scales/{self.site.name}"]).clamp_min(0)
        return codebooks, self.packed.scales.float() * factor

    def product(self, start: bool) -> Product:
        """At the start that with the weight as it lies in the file, whose own grid of compact
        scales another rounding might not meet."""
        codebooks, scales = self.moved()
        packed = self.packed
        if not start:
            packed = with_tables(packed, codebooks.detach(), _detached(scales))

        def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
            y = packed_product(x, codebooks, scales, packed)
            return y if bias is None else y + bias

        return multiply

    def stored(self) -> dict[str, Tensor]:
        codebooks, scales = self.moved()
        made = {f"codebooks/{self.site.name}": codebooks.detach()}
        if scales is not None:
            made[f"scales/{self.site.name}"] = scales.detach()
        return made


class _Student:
    """The quantized model in training: its tables, and the one-dimensional parameters."""

    def __init__(self, program: Program) -> None:
        assert program.graph is not None
        self.program = program
        reads = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
        self.starts = {
            name: tensor.detach().float()
            for name, tensor in program.tensors.items()
            if name in reads and isinstance(tensor, nn.Parameter) and tensor.dim() == 1
        }
        self.units = {n: t.square().mean().sqrt().clamp_min(1e-3) for n, t in self.starts.items()}
        packed = {site.name: program.fact(site.name, Packed).weight for site in program.sites}
        shapes = {f"tensor/{name}": tensor.shape for name, tensor in self.starts.items()}
        for site in program.sites:
            shapes |= _Tables.shapes(site, packed[site.name])
        self.adam = Adam(shapes)
        self.sites = [_Tables(site, packed[site.name], self.adam) for site in program.sites]

    def tensors(self) -> dict[str, Tensor]:
        old, values = self.program.tensors, self.adam.values
        return {
            name: (start + self.units[name] * values[f"tensor/{name}"]).to(old[name].dtype)
            for name, start in self.starts.items()
        }

    def linears(self) -> Linears:
        made: dict[str, tuple[Product, Rotation]] = {}
        for tables in self.sites:
            pair = (tables.product(start=not self.adam.steps), tables.packed.rotation)
            made |= dict.fromkeys(tables.site.nodes, pair)
        return made

    def stored(self) -> dict[str, Tensor]:
        """`codebooks/site` and `scales/site`, flat, and `tensor/name`."""
        made = {f"tensor/{name}": t.detach() for name, t in self.tensors().items()}
        for tables in self.sites:
            made |= tables.stored()
        return made


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _with_tuned(program: Program, tuned: Mapping[str, Tensor]) -> Program:
    outcome = ModelTuning(*tuned["kl"].tolist())
    facts: dict[str, list[object]] = {}
    for site in program.sites:
        old = program.fact(site.name, Packed)
        codebooks = tuned.get(f"codebooks/{site.name}")
        if codebooks is None:
            facts[site.name] = [old, outcome]
            continue
        packed = with_tables(old.weight, codebooks, tuned.get(f"scales/{site.name}"))
        gram = program.fact(site.name, Statistics).load(site.k)
        left = output_error(program.weight(site) - packed.dequantize(), gram)
        facts[site.name] = [replace(old, weight=packed, error=left / old.energy), outcome]
    changed = {n.removeprefix("tensor/"): t for n, t in tuned.items() if n.startswith("tensor/")}
    return with_tensors(program, changed).with_facts(facts)
