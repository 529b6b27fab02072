"""Blocks: where one activation joins a part of a graph to the next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowra.compiler.blocks import find_blocks
from tests.compiler.captured import normalized


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"model.layers.0": 7, "model.layers.1": 7}),
        ("gpt2", {"transformer.h.0": 4, "transformer.h.1": 4}),
        ("bert", {"bert.encoder.layer.0": 6, "bert.encoder.layer.1": 6,
                  "cls.predictions.transform.dense": 1}),
        ("mixtral", {"model.layers.0.self_attn": 4, "model.layers.1.self_attn": 4}),
        ("mlp", {"up": 1, "down": 1}),
    ],
)  # fmt: skip
def test_blocks_are_the_layers(name: str, expected: dict[str, int]) -> None:
    _, program = normalized(name)
    assert {block.name: len(block.sites) for block in find_blocks(program)} == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mlp"])
def test_blocks_follow_each_other_without_a_gap(name: str) -> None:
    _, program = normalized(name)
    assert program.graph is not None
    names = [node.name for node in program.graph.nodes]
    blocks = find_blocks(program)
    start = names.index(blocks[0].nodes[0])
    joined = [node for block in blocks for node in block.nodes]
    assert joined == names[start : start + len(joined)]
    for before, after in zip(blocks, blocks[1:], strict=False):
        assert before.exit == after.entry


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_that_reads_an_encoder_all_the_way_has_no_blocks(name: str) -> None:
    _, program = normalized(name)
    assert find_blocks(program) == []


def test_without_a_graph_there_are_no_blocks() -> None:
    _, program = normalized("llama")
    assert find_blocks(replace(program, graph=None)) == []
