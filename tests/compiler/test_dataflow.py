"""Siblings, liveness and cuts of a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

from lowra.compiler.dataflow import dataflow, live_after, segments, siblings
from lowra.compiler.program import Program, Site
from tests.compiler.captured import normalized

aten = torch.ops.aten


def input_of(program: Program, site: Site) -> str:
    """The value that the first linear of a site reads."""
    assert program.graph is not None
    node = next(node for node in program.graph.nodes if node.name == site.nodes[0])
    return node.args[0].name


def diamond() -> fx.Graph:
    """x -> relu -> a; a -> neg -> b; a -> abs -> c; b + c -> d; d @ w -> e."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    a = graph.create_node("call_function", aten.relu.default, (x,), name="a")
    b = graph.create_node("call_function", aten.neg.default, (a,), name="b")
    c = graph.create_node("call_function", aten.abs.default, (a,), name="c")
    d = graph.create_node("call_function", aten.add.Tensor, (b, c), name="d")
    e = graph.create_node("call_function", aten.mm.default, (d, w), name="e")
    graph.output(e)
    return graph


def test_dataflow_has_an_edge_from_every_value_to_every_use() -> None:
    flow = dataflow(diamond())
    assert list(flow.nodes) == ["x", "w", "a", "b", "c", "d", "e", "output"]
    assert set(flow.edges) == {
        ("x", "a"), ("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "e"), ("w", "e"),
        ("e", "output"),
    }  # fmt: skip


def test_a_value_is_live_until_its_last_use_and_constants_never_are() -> None:
    # after             x      w      a      b           c           d      e      output
    expected = [{"x"}, {"x"}, {"a"}, {"a", "b"}, {"b", "c"}, {"d"}, {"e"}, set()]
    assert live_after(dataflow(diamond())) == expected


def test_a_value_without_a_use_is_never_live() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(aten.neg.default, (x,))
    graph.output(x)
    assert live_after(dataflow(graph)) == [{"x"}, {"x"}, set()]


def test_siblings_of_a_llama_share_an_input_within_a_layer() -> None:
    _, program = normalized("llama")
    groups = [
        tuple(site.name.removeprefix("model.layers.") for site in group)
        for group in siblings(program)
    ]
    layer = [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert groups == [tuple(f"{i}.{name}" for name in names) for i in (0, 1) for names in layer]


def test_cross_attention_keys_and_values_of_all_layers_are_siblings() -> None:
    """They all read the encoder's output."""
    _, program = normalized("t5")
    group = next(g for g in siblings(program) if any("EncDecAttention.k" in s.name for s in g))
    assert [site.name.rsplit(".", 1)[1] for site in group] == ["k", "v"] * 2


def test_sites_without_dataflow_have_no_siblings() -> None:
    _, program = normalized("llama")
    bare = replace(program, graph=None)
    assert siblings(bare) == [(site,) for site in program.sites]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mlp"])
def test_segments_cover_the_graph_once_and_in_order(name: str) -> None:
    _, program = normalized(name)
    assert program.graph is not None
    marks = list(dict.fromkeys(input_of(program, group[0]) for group in siblings(program)))
    parts = segments(program.graph, marks)
    assert [n for part in parts for n in part] == [node.name for node in program.graph.nodes]
    assert all(set(part) & set(marks) for part in parts[:-1])
    assert all(parts)


@pytest.mark.parametrize(("name", "layer"), [("llama", "layers"), ("gpt2", "h")])
def test_no_segment_holds_two_layers(name: str, layer: str) -> None:
    """What `collect-statistics` needs to keep its memory to about one layer."""
    _, program = normalized(name)
    assert program.graph is not None
    groups = {input_of(program, group[0]): group[0].name for group in siblings(program)}
    for part in segments(program.graph, list(groups)):
        owners = [
            groups[value].split(f"{layer}.")[1].split(".")[0] for value in part if value in groups
        ]
        assert len(set(owners)) <= 1, f"one segment of {len(part)} nodes has layers {owners}"


def test_segments_of_the_diamond_cut_at_its_waist() -> None:
    assert segments(diamond(), ["a", "d"]) == [["x", "w", "a"], ["b", "c", "d", "e", "output"]]
    assert segments(diamond(), ["d"]) == [["x", "w", "a", "b", "c", "d", "e", "output"]]
