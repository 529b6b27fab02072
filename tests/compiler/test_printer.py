"""One text for one program: layers fold, facts stand below their op, nothing drifts."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from lowra.compiler.capture import capture
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.printer import print_program
from lowra.passes import CollectStatistics, NormalizeLinears, RotateInputs
from tests.compiler.captured import arithmetic, captured, normalized
from tests.golden_text import GoldenFile


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Tower(nn.Module):
    """Three equal layers and one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


DATA_FREE = (NormalizeLinears(), RotateInputs(), CollectStatistics())


def test_equal_layers_fold(golden: GoldenFile) -> None:
    golden.check(print_program(run_pipeline(capture(Tower(), (arithmetic(4, 8),)), DATA_FREE)))


def test_program_whose_layers_fold_runs() -> None:
    model, x = Tower(), arithmetic(5, 8)
    program = run_pipeline(capture(model, (arithmetic(4, 8),)), DATA_FREE)
    torch.testing.assert_close(program.module()(x), model(x))


def test_layers_that_differ_do_not_fold() -> None:
    model = Tower()
    model.layers[1].up = nn.Linear(8, 16, bias=False)
    text = print_program(capture(model, (arithmetic(4, 8),)))
    assert "alike" not in text and "layers.2\n" in text


def test_text_of_a_llama_has_its_inputs_layers_and_totals() -> None:
    _, program = normalized("llama")
    text = print_program(program)
    assert print_program(program) == text and text.endswith("\n")
    assert text.startswith("# normalize-linears\nprogram(%input_ids, %attention_mask) -> %")
    assert "\nmodel.layers.0\n" in text and "\nmodel.layers.1\n" in text
    assert "\n  %model.layers.1.self_attn.q_proj = linear(%model.layers.1." in text
    assert text.splitlines()[-1] == f"sites 14, weights {sum(s.weights for s in program.sites)}"


def test_nothing_that_drifts_is_printed() -> None:
    for name in ("llama", "gpt2", "t5", "bert"):
        text = print_program(normalized(name)[1])
        assert not re.search(r"0x[0-9a-f]{6}|\bs\d+\b|/tmp|object at", text), name


def test_a_captured_program_says_so() -> None:
    assert print_program(captured("mlp")[1]).startswith("# captured\n")


def test_module_tree_prints_sites_and_why_there_is_no_graph(golden: GoldenFile) -> None:
    golden.check(print_program(run_pipeline(capture(Tower()), DATA_FREE)))
