"""rewrite-linears: linears of compressed sites become quantized linears with LoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from lowra.compiler.facts import Adapter, Packed
from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program, Site


@dataclass(frozen=True)
class RewriteLinears(Pass):
    """linear(x, weight, bias)  ->  quantized_linear_lora(x, packed weight, bias, A, B, scaling)

    Without an Adapter fact the op is quantized_linear. The dense weight leaves the program when
    nothing else reads it; packed tensors come in under the module's name.
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
                mapping[node] = _dequantized(graph, program, tied, node, mapping)
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


def _dequantized(
    graph: fx.Graph, program: Program, site: Site, node: fx.Node, mapping: dict[fx.Node, fx.Node]
) -> fx.Node:
    """embedding(weight, ids)  ->  embedding(dequantize(packed weight), ids)"""
    reads = _read_packed(graph, program, site)
    layout = program.fact(site.name, Packed).weight.op_args()[4:]
    args: tuple[Any, ...] = (
        reads["codes"], reads["codebooks"], reads.get("scales"), reads["order"],
        *layout, site.dtype,
    )  # fmt: skip
    table = graph.call_function(torch.ops.lowra.dequantize.default, args)
    table.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
    rest = fx.map_arg(node.args[1:], lambda n: mapping[n])
    new = graph.create_node("call_function", node.target, (table, *rest), name=node.name)
    new.meta = dict(node.meta)
    return new


def _read_packed(graph: fx.Graph, program: Program, site: Site) -> dict[str, Any]:
    names = (name.rsplit(".", 1)[1] for name in site_tensors(program, site))
    return {role: graph.get_attr(f"{site.name}.{role}") for role in names}


def _pure(node: fx.Node) -> bool:
    return node.op == "get_attr" or node.target is torch.ops.aten.t.default


def site_tensors(program: Program, site: Site) -> dict[str, Tensor]:
    """Every tensor the compressed node reads, by qualified name."""
    weight = program.fact(site.name, Packed).weight
    named: dict[str, Tensor] = {"codes": weight.codes, "codebooks": weight.codebooks}
    if weight.scales is not None:
        named["scales"] = weight.scales
    named["order"] = weight.order
    adapter = program.find(site.name, Adapter)
    if adapter is not None:
        named["lora_A"] = adapter.lora_a.to(site.dtype)
        named["lora_B"] = adapter.lora_b.to(site.dtype)
    return {f"{site.name}.{role}": tensor for role, tensor in named.items()}


def _rewritten(
    graph: fx.Graph, program: Program, site: Site, node: fx.Node, mapping: dict[fx.Node, fx.Node]
) -> fx.Node:
    weight = program.fact(site.name, Packed).weight
    adapter = program.find(site.name, Adapter)
    x, bias = mapping[node.args[0]], node.args[2] if len(node.args) > 2 else None  # pyright: ignore
    reads = _read_packed(graph, program, site)
    layout = weight.op_args()[4:]
    args: tuple[Any, ...] = (
        x, reads["codes"], reads["codebooks"], reads.get("scales"), reads["order"], *layout,
        None if bias is None else mapping[bias],  # pyright: ignore
    )  # fmt: skip
    target = torch.ops.lowra.quantized_linear.default
    if adapter is not None:
        target = torch.ops.lowra.quantized_linear_lora.default
        args = (*args, reads["lora_A"], reads["lora_B"], adapter.scaling)
    new = graph.create_node("call_function", target, args, name=node.name)
    new.meta = dict(node.meta)
    return new
