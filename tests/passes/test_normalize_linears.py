"""Every linear-like node gets one form; what is left out says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowra.compiler.capture import capture
from lowra.compiler.errors import CaptureError, PatternError, WeightError
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.printer import print_program
from lowra.compiler.program import Program
from lowra.passes import NormalizeLinears
from tests.compiler.captured import arithmetic, captured, normalized, three_products
from tests.golden_text import GoldenFile
from tests.models import plain_mlp, tokens

aten = torch.ops.aten


def linears(program: Program) -> dict[str, str]:
    """Op of every node of every site."""
    assert program.graph is not None
    nodes = {node.name: node for node in program.graph.nodes}
    return {name: str(nodes[name].target) for site in program.sites for name in site.nodes}


def test_three_kinds_of_product(golden: GoldenFile) -> None:
    _, program = three_products()
    golden.check(print_program(run_pipeline(program, (NormalizeLinears(),))))


def test_normalized_program_computes_the_same() -> None:
    model, program = three_products()
    x = arithmetic(7, 32)
    torch.testing.assert_close(run_pipeline(program, (NormalizeLinears(),)).module()(x), model(x))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert", "mixtral"])
def test_normalized_language_model_computes_the_same(name: str) -> None:
    model, program = normalized(name)
    inputs = tokens(model, batch=1, length=5)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*inputs.values()), model(**inputs).logits)
    assert set(linears(program).values()) == {"aten.linear.default"}
    assert all(site.nodes for site in program.sites)


def test_conv1d_of_gpt2_becomes_a_linear_of_its_transpose() -> None:
    model, before = captured("gpt2")
    _, program = normalized("gpt2")
    assert before.graph is not None and program.graph is not None
    assert any(node.target is aten.addmm.default for node in before.graph.nodes)
    assert not any(node.target is aten.addmm.default for node in program.graph.nodes)
    site = program.site("transformer.h.0.attn.c_attn")
    assert site.transposed and (site.n, site.k) == (192, 64)
    stored = dict(model.named_parameters())["transformer.h.0.attn.c_attn.weight"]
    assert torch.equal(program.weight(site), stored.T)


def test_shapes_and_names_of_sites() -> None:
    _, program = normalized("llama")
    sites = {site.name: (site.n, site.k) for site in program.sites}
    assert len(sites) == 14 and sites["model.layers.1.mlp.gate_proj"] == (96, 64)
    assert sites["model.layers.0.self_attn.k_proj"] == (32, 64)


def test_what_is_skipped_has_its_reason() -> None:
    reasons = {s.name: s.reason for s in normalized("llama")[1].skipped}
    assert reasons == {
        "model.embed_tokens.weight": "embedding, kept in 16 bit",
        "lm_head.weight": "output head, kept in 16 bit; include it to compress it",
    }
    reasons = {s.name: s.reason for s in normalized("mixtral")[1].skipped}
    experts = reasons["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts == "a tensor of 3 axes (experts, convolution), not one linear"
    assert reasons["model.layers.0.mlp.gate.weight"] == "not held by a Linear"
    reasons = {s.name: s.reason for s in normalized("gpt2")[1].skipped}
    assert reasons["transformer.wte.weight"].startswith("output head")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "bert", "mixtral", "mlp"])
def test_every_weight_is_a_site_or_skipped(name: str) -> None:
    _, program = normalized(name)
    found = {site.weight for site in program.sites} | {s.name for s in program.skipped}
    assert found == {weight.name for weight in program.weights}
    assert len(found) == len(program.sites) + len(program.skipped)


def test_head_is_compressed_when_included() -> None:
    _, program = captured("llama")
    done = run_pipeline(program, (NormalizeLinears(include=("lm_head",)),))
    assert done.sites[-1].name == "lm_head" and len(done.sites) == 15


def test_head_tied_to_an_embedding_is_a_site_of_the_head_when_included() -> None:
    _, program = captured("gpt2")
    done = run_pipeline(program, (NormalizeLinears(include=("lm_head",)),))
    site = done.site("lm_head")
    assert site.weight == "transformer.wte.weight" and site.embeddings == ("transformer.wte",)


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (("*.q_proj",), 12),
        ((r"re:layers\.0\.",), 7),
        (("*.mlp.*", "*.o_proj"), 6),
    ],
)
def test_ignored_weights_are_skipped_with_that_reason(patterns: tuple[str, ...], left: int) -> None:
    _, program = captured("llama")
    done = run_pipeline(program, (NormalizeLinears(ignore=patterns),))
    assert len(done.sites) == left
    assert sum(s.reason == "ignored by the recipe" for s in done.skipped) == 14 - left


@pytest.mark.parametrize("option", ["include", "ignore"])
def test_a_pattern_that_matches_nothing_names_the_nearest(option: str) -> None:
    _, program = captured("llama")
    with pytest.raises(PatternError, match=f"{option}='lmhead' matches no weight") as caught:
        run_pipeline(program, (NormalizeLinears(**{option: ("lmhead",)}),))
    assert "nearest: lm_head" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    model = plain_mlp()
    with torch.no_grad():
        model.down.weight[3, 5] = value
    program = capture(model, (torch.randn(2, 33),))
    with pytest.raises(WeightError, match=rf"down: weight\[3, 5\] is {value}; 1 values are not"):
        run_pipeline(program, (NormalizeLinears(),))
    left = run_pipeline(program, (NormalizeLinears(ignore=("down",)),))
    assert [site.name for site in left.sites] == ["up"]


def test_a_weight_of_integers_is_refused() -> None:
    model = plain_mlp()
    model.up.weight = nn.Parameter(torch.ones(47, 33, dtype=torch.int8), requires_grad=False)
    with pytest.raises(WeightError, match="up: weight is torch.int8, not a float"):
        run_pipeline(capture(model), (NormalizeLinears(),))


@pytest.mark.parametrize("model", [nn.LayerNorm(8), nn.Sequential(nn.Embedding(8, 8), nn.ReLU())])
def test_a_model_without_linears_is_refused(model: nn.Module) -> None:
    with pytest.raises(CaptureError, match="the model has no linear weights to compress"):
        run_pipeline(capture(model), (NormalizeLinears(),))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_linear_that_the_graph_does_not_read_is_skipped() -> None:
    program = run_pipeline(capture(Unused(), (torch.randn(2, 8),)), (NormalizeLinears(),))
    assert [site.name for site in program.sites] == ["used"]
    assert program.skipped[0].reason == "no linear of the traced graph reads it"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(8, 8)
        self.again = self.same

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.relu(self.same(x)))


def test_a_weight_used_twice_is_one_site_with_two_nodes() -> None:
    program = run_pipeline(capture(Twice(), (torch.randn(2, 8),)), (NormalizeLinears(),))
    assert [(site.name, len(site.nodes)) for site in program.sites] == [("same", 2)]


class BothWays(nn.Module):
    """An autoencoder whose decoder is its encoder transposed, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x) @ self.encoder.weight)


def test_a_weight_multiplied_from_the_other_side_is_no_node_of_its_site() -> None:
    """`x @ weight` has n inputs; only `x @ weight'` may become a quantized linear."""
    model, x = BothWays(), torch.randn(3, 16)
    program = run_pipeline(capture(model, (torch.randn(2, 16),)), (NormalizeLinears(),))
    torch.testing.assert_close(program.module()(x), model(x))
    nodes = {site.name: len(site.nodes) for site in program.sites}
    assert nodes in ({"encoder": 1, "head": 1}, {"head": 1})


class ByHand(nn.Module):
    """Linears written as products with a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.addmm(self.up.bias, x, self.up.weight.t())
        return h @ self.down.weight.transpose(0, 1)


def test_products_with_a_transposed_weight_become_linears() -> None:
    model, x = ByHand(), torch.randn(3, 16)
    program = run_pipeline(capture(model, (torch.randn(2, 16),)), (NormalizeLinears(),))
    assert "down" in {site.name for site in program.sites}
    assert set(linears(program).values()) == {"aten.linear.default"}
    torch.testing.assert_close(program.module()(x), model(x))


def test_addmm_with_a_transposed_weight_becomes_a_linear() -> None:
    program = run_pipeline(capture(ByHand(), (torch.randn(2, 16),)), (NormalizeLinears(),))
    assert {site.name for site in program.sites} == {"up", "down"}


class Scaled(nn.Module):
    """addmm with factors, which a linear does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.up.bias, x, self.up.weight.t(), alpha=2.0)


def test_addmm_with_factors_is_left_alone() -> None:
    with pytest.raises(CaptureError, match="no linear of the traced graph reads it"):
        run_pipeline(capture(Scaled(), (torch.randn(2, 16),)), (NormalizeLinears(),))


def test_module_tree_finds_the_same_sites() -> None:
    model, graph = normalized("mlp")
    tree = run_pipeline(capture(model), (NormalizeLinears(),))
    assert [(s.name, s.n, s.k) for s in tree.sites] == [(s.name, s.n, s.k) for s in graph.sites]
    assert all(site.nodes == () for site in tree.sites)
