"""rewrite-linears: linears of compressed sites become quantized linears with LoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lowra.compiler.correction import FACTORS, Correction
from lowra.compiler.facts import Adapter, Packed
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site
from lowra.compiler.storage import PackedWeight

ATEN, OPS = torch.ops.aten, torch.ops.lowra


@dataclass(frozen=True)
class RewriteLinears(Pass):
    """linear(x, weight, bias)  ->  quantized_linear_lora(x, packed weight, bias, A, B, scaling)

    Without an Adapter fact the op is quantized_linear. With a Correction fact its output gets
    + quantized_linear(x, packed A) @ dequantize(packed B'). The dense weight leaves the program
    when nothing else reads it; packed tensors come in under the module's name.
    """

    name: ClassVar[str] = "rewrite-linears"
    reads: ClassVar = (Packed,)

    def run(self, program: Program) -> Program:
        if program.graph is None:
            return program
        sites = {node: site for site in program.sites for node in site.nodes}
        embeddings = {site.weight: site for site in program.sites if site.embeddings}
        tensors: dict[str, Tensor] = dict(program.tensors)
        for site in program.sites:
            tensors.update(site_tensors(program, site))
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            if (tied := _tied_embedding(node, embeddings)) is not None:
                mapping[node] = _looked_up(graph, program, tied, node, mapping)
            elif node.name in sites:
                mapping[node] = _rewritten(graph, program, sites[node.name], node, mapping)
            else:
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        for node in reversed(graph.nodes):
            if not node.users and node.op in ("get_attr", "call_function") and _pure(node):
                graph.erase_node(node)
        read = {node.target for node in graph.nodes if node.op == "get_attr"}
        return replace(
            program, graph=graph, tensors={k: v for k, v in tensors.items() if k in read}
        )


def _tied_embedding(node: fx.Node, embeddings: dict[str, Site]) -> Site | None:
    """The site whose weight an embedding node looks rows up in."""
    if node.target is not torch.ops.aten.embedding.default:
        return None
    table: Any = node.args[0]
    return embeddings.get(str(table.target)) if table.op == "get_attr" else None


def _looked_up(
    graph: fx.Graph, program: Program, site: Site, node: fx.Node, mapping: dict[fx.Node, fx.Node]
) -> fx.Node:
    """embedding(weight, ids)  ->  lowra::embedding(ids, packed weight)"""
    emit, ids = _Emitter(graph, node), mapping[node.args[1]]  # pyright: ignore
    packed = emit.packed(site.name, program.fact(site.name, Packed).weight)
    args = (ids, *packed, site.dtype)
    new = graph.create_node("call_function", OPS.embedding.default, args, name=node.name)
    new.meta = dict(node.meta)
    correction = program.find(site.name, Correction)
    if correction is None:
        return new
    a, b = (
        emit.dequantized(f"{site.name}.{name}", factor, site.dtype)
        for name, factor in correction.factors().items()
    )
    low = emit(ATEN.embedding.default, emit(ATEN.t.default, b), ids)
    total = emit(ATEN.add.Tensor, new, emit(ATEN.matmul.default, low, a))
    total.meta = dict(node.meta)
    return total


@dataclass(frozen=True)
class _Emitter:
    """Adds nodes to `graph` that belong to the layer of `like`."""

    graph: fx.Graph
    like: fx.Node

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {"nn_module_stack": self.like.meta.get("nn_module_stack")}
        return node

    def packed(self, prefix: str, weight: PackedWeight) -> tuple[Any, ...]:
        """The packed arguments of an op, its tensors read under `prefix`."""
        reads = {role: self.graph.get_attr(f"{prefix}.{role}") for role in _roles(weight)}
        return (
            reads["codes"], reads["codebooks"], reads.get("scales"), reads["order"],
            *weight.op_args()[4:],
        )  # fmt: skip

    def dequantized(self, prefix: str, weight: PackedWeight, dtype: torch.dtype) -> fx.Node:
        return self(OPS.dequantize.default, *self.packed(prefix, weight), dtype)


def _pure(node: fx.Node) -> bool:
    return node.op == "get_attr" or node.target is torch.ops.aten.t.default


def _roles(weight: PackedWeight) -> dict[str, Tensor]:
    """What an op reads of a packed weight, by role."""
    named: dict[str, Tensor] = {"codes": weight.codes, "codebooks": weight.codebooks}
    if weight.scales is not None:
        named["scales"] = weight.scales
    return {**named, "order": weight.order}


def site_tensors(program: Program, site: Site) -> dict[str, Tensor]:
    """Every tensor the compressed node reads, by qualified name."""
    named = _roles(program.fact(site.name, Packed).weight)
    if correction := program.find(site.name, Correction):
        for name, factor in correction.factors().items():
            named |= {f"{name}.{role}": tensor for role, tensor in _roles(factor).items()}
    adapter = program.find(site.name, Adapter)
    if adapter is not None:
        named["lora_A"] = adapter.lora_a.to(site.dtype)
        named["lora_B"] = adapter.lora_b.to(site.dtype)
    return {f"{site.name}.{role}": tensor for role, tensor in named.items()}


def _rewritten(
    graph: fx.Graph, program: Program, site: Site, node: fx.Node, mapping: dict[fx.Node, fx.Node]
) -> fx.Node:
    emit = _Emitter(graph, node)
    adapter = program.find(site.name, Adapter)
    x, bias = mapping[node.args[0]], node.args[2] if len(node.args) > 2 else None  # pyright: ignore
    args: tuple[Any, ...] = (
        x, *emit.packed(site.name, program.fact(site.name, Packed).weight),
        None if bias is None else mapping[bias],  # pyright: ignore
    )  # fmt: skip
    target = OPS.quantized_linear.default
    if adapter is not None:
        target = OPS.quantized_linear_lora.default
        factors = (graph.get_attr(f"{site.name}.{role}") for role in ("lora_A", "lora_B"))
        args = (*args, *factors, adapter.scaling)
    new = graph.create_node("call_function", target, args, name=node.name)
    new.meta = dict(node.meta)
    correction = program.find(site.name, Correction)
    return new if correction is None else _corrected(emit, site, x, new, correction)


def _corrected(
    emit: _Emitter, site: Site, x: fx.Node, y: fx.Node, correction: Correction
) -> fx.Node:
    """y + C x"""
    a, b = (f"{site.name}.{name}" for name in FACTORS)
    low = emit(OPS.quantized_linear.default, x, *emit.packed(a, correction.a), None)
    table = emit.dequantized(b, correction.b, site.dtype)
    total = emit(ATEN.add.Tensor, y, emit(ATEN.matmul.default, low, table))
    total.meta = dict(y.meta)
    return total
