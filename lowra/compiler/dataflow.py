"""Questions to a graph, answered by networkx: siblings, liveness, where to cut."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median_low
from typing import cast

import networkx as nx
from torch import fx

from lowra.compiler.program import Program, Site


def dataflow(graph: fx.Graph) -> nx.DiGraph[str]:
    """A directed graph of node names in topological order; edges run from value to use."""
    flow: nx.DiGraph[str] = nx.DiGraph()
    for position, node in enumerate(graph.nodes):
        flow.add_node(node.name, position=position, op=node.op)
        flow.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return flow


def siblings(program: Program) -> list[tuple[Site, ...]]:
    """Sites grouped by the inputs they share (q/k/v, gate/up), in graph order."""
    groups: dict[tuple[str, ...], list[Site]] = {}
    for site in program.sites:
        groups.setdefault(inputs_of(program, site) or (site.name,), []).append(site)
    return [tuple(group) for group in groups.values()]


def inputs_of(program: Program, site: Site) -> tuple[str, ...]:
    """The distinct values that a site's linear nodes read; empty without dataflow."""
    if program.graph is None:
        return ()
    nodes = {node.name: node for node in program.graph.nodes if node.name in site.nodes}
    read = (cast("fx.Node", nodes[name].args[0]).name for name in site.nodes)
    return tuple(dict.fromkeys(read))


def live_after(flow: nx.DiGraph[str]) -> list[set[str]]:
    """Per position, the computed values made so far that a later node still reads."""
    names = sorted(flow.nodes, key=lambda name: flow.nodes[name]["position"])
    last_use = {
        name: max((flow.nodes[user]["position"] for user in flow.successors(name)), default=-1)
        for name in names
        if flow.nodes[name]["op"] != "get_attr"
    }
    live: set[str] = set()
    result: list[set[str]] = []
    for position, name in enumerate(names):
        if name in last_use:
            live = live | {name}
        live = {value for value in live if last_use[value] > position}
        result.append(live)
    return result


def segments(graph: fx.Graph, marks: Sequence[str]) -> list[list[str]]:
    """Cut the graph into runs of node names between consecutive `marks`, where least is live.

    Each segment but the last holds at least one mark (a value whose statistics are wanted). Of the
    narrowest positions between marks, the narrower half are cut: those are the borders of layers,
    and of attention and MLP, where little but the residual stream is live.
    """
    flow = dataflow(graph)
    live = [len(values) for values in live_after(flow)]
    names = [node.name for node in graph.nodes]
    position = {name: index for index, name in enumerate(names)}
    stops = sorted(position[mark] for mark in marks)
    cuts = [
        min(range(left, right), key=lambda at: (live[at], at))
        for left, right in zip(stops, stops[1:], strict=False)
    ]
    narrow = median_low([live[cut] for cut in cuts]) if cuts else 0
    borders = [-1, *(cut for cut in cuts if live[cut] <= narrow), len(names) - 1]
    return [names[a + 1 : b + 1] for a, b in zip(borders, borders[1:], strict=False) if b > a]
