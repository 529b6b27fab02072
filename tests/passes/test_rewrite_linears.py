"""The rewritten program computes with packed weights and adapters, and holds no dense ones."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowra.compiler.capture import capture
from lowra.compiler.correction import Correction
from lowra.compiler.facts import Adapter, Packed
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.printer import print_program
from lowra.compiler.program import Program
from lowra.passes import (
    AssignPrecision,
    CollectStatistics,
    CorrectWeights,
    FitCodebooks,
    InitializeAdapters,
    NormalizeLinears,
    QuantizeWeights,
    RewriteLinears,
    RotateInputs,
)
from tests.compiler.captured import arithmetic, compiled_from, three_products
from tests.golden_text import GoldenFile
from tests.models import plain_mlp
from tests.passes.site_programs import CyclicWidths

PACK: tuple[Pass, ...] = (
    NormalizeLinears(), RotateInputs(), CollectStatistics(), FitCodebooks(widths=(1, 2, 4)),
    CyclicWidths(), QuantizeWeights(),
)  # fmt: skip
FULL = (*PACK, InitializeAdapters(rank=2, alpha=4.0), RewriteLinears())
OPS = torch.ops.lowra


def dense_model(model: nn.Module, program: Program) -> nn.Module:
    """`model` with the dequantized weights, and the adapters merged, in place."""
    with torch.no_grad():
        for site in program.sites:
            weight = program.fact(site.name, Packed).weight.dequantize()
            if correction := program.find(site.name, Correction):
                weight = weight + correction.product()
            if adapter := program.find(site.name, Adapter):
                weight = weight + adapter.scaling * adapter.lora_b @ adapter.lora_a
            dense = dict(model.named_parameters())[site.weight]
            dense.copy_(weight.T if site.transposed else weight)
    return model


def ops_of(program: Program) -> list[object]:
    assert program.graph is not None
    return [node.target for node in program.graph.nodes if "lowra" in str(node.target)]


def test_whole_pipeline_on_three_products(golden: GoldenFile) -> None:
    """Two widths, two blocks, a bias, a skipped parameter; the errors are robust to rounding."""
    _, program = three_products()
    steps = (*PACK[:4], AssignPrecision(5.5), *FULL[5:])
    golden.check(print_program(compiled_from(program, steps)))


def test_rewritten_program_equals_the_dense_weights_with_lora() -> None:
    model, program = three_products()
    x = arithmetic(9, 32)
    done = compiled_from(program, FULL)
    assert ops_of(done) == [OPS.quantized_linear_lora.default] * 2
    torch.testing.assert_close(done.module()(x), dense_model(model, done)(x), rtol=1e-4, atol=1e-4)


def test_corrected_program_reads_both_factors_and_equals_its_dense_self(
    golden: GoldenFile,
) -> None:
    model, program = three_products()
    steps = (*PACK, CorrectWeights(rank=2, rounds=0), *FULL[-2:])
    done = compiled_from(program, steps)
    linear = [OPS.quantized_linear_lora.default, OPS.quantized_linear.default]
    assert ops_of(done) == [*linear, OPS.dequantize.default] * 2
    x = arithmetic(9, 32)
    torch.testing.assert_close(done.module()(x), dense_model(model, done)(x), rtol=1e-4, atol=1e-4)
    golden.check(print_program(done))


def test_dense_weights_are_gone_and_what_is_read_is_held() -> None:
    _, program = three_products()
    done = compiled_from(program, FULL)
    roles = ("codes", "codebooks", "scales", "order", "lora_A", "lora_B")
    packed = {f"{name}.{role}" for name in ("up", "down") for role in roles}
    assert set(done.tensors) == packed | {"up.bias", "mix"}
    assert {"up.weight", "down.weight"} <= set(program.tensors), "the first program was changed"
    assert done.graph is not None
    assert {node.target for node in done.graph.nodes if node.op == "get_attr"} == set(done.tensors)


def test_without_adapters_the_op_is_the_plain_one() -> None:
    model, program = three_products()
    done = compiled_from(program, (*PACK, RewriteLinears()))
    assert ops_of(done) == [OPS.quantized_linear.default] * 2
    x = arithmetic(3, 32)
    torch.testing.assert_close(done.module()(x), dense_model(model, done)(x), rtol=1e-4, atol=1e-4)


class Transposed(nn.Module):
    """Weights stored [k, n], as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(24, 16), Conv1D(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def test_rewritten_conv1d_equals_its_dense_self_after_calibration() -> None:
    model, x = Transposed(), torch.randn(2, 5, 16)
    program = replace(capture(model, (torch.randn(2, 3, 16),)), calibration=((x,),))
    done = compiled_from(program, FULL)
    assert len(ops_of(done)) == 2 and all(site.transposed for site in done.sites)
    got = done.module()(x)
    torch.testing.assert_close(got, dense_model(model, done)(x), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """One weight in an embedding, a head and a second call of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.head(h) + self.head(torch.relu(h))


def test_an_embedding_tied_to_a_compressed_head_reads_the_packed_weight() -> None:
    model, ids = Tied(), torch.arange(10).view(2, 5)
    program = capture(model, (ids,))
    steps = (NormalizeLinears(include=("head",)), *FULL[1:])
    done = compiled_from(program, steps)
    assert [str(op).split(".")[1] for op in ops_of(done)] == [
        "embedding", "quantized_linear_lora", "quantized_linear_lora"
    ]  # fmt: skip
    assert "embed.weight" not in done.tensors
    weight = done.fact("head", Packed).weight.dequantize()
    adapter = done.fact("head", Adapter)
    weight = weight + adapter.scaling * adapter.lora_b @ adapter.lora_a
    h = done.fact("head", Packed).weight.dequantize()[ids]
    torch.testing.assert_close(
        done.module()(ids), (h + torch.relu(h)) @ weight.T, rtol=1e-4, atol=1e-4
    )


class BothWays(nn.Module):
    """An autoencoder whose decoder is its encoder transposed, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(16, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x) @ self.encoder.weight)


def test_a_weight_multiplied_from_both_sides_still_computes_the_same() -> None:
    model, x = BothWays(), torch.randn(3, 16)
    steps = (*PACK[:3], FitCodebooks((8,)), *FULL[4:])
    done = compiled_from(capture(model, (torch.randn(2, 16),)), steps)
    torch.testing.assert_close(done.module()(x), model(x), rtol=0.1, atol=0.1)


def test_half_precision_models_get_adapters_of_their_own_dtype() -> None:
    model = plain_mlp().bfloat16()
    program = capture(model, (torch.randn(2, 33).bfloat16(),))
    done = compiled_from(program, FULL)
    assert done.tensors["up.lora_A"].dtype == done.tensors["up.lora_B"].dtype == torch.bfloat16
    x = torch.randn(4, 33).bfloat16()
    y = done.module()(x)
    assert y.dtype == torch.bfloat16
    want = dense_model(model, done)(x)
    torch.testing.assert_close(y, want, rtol=0.1, atol=0.05)


def test_gradients_reach_the_adapters_through_the_program() -> None:
    _, program = three_products()
    done = compiled_from(program, FULL)
    factors = {key: t.requires_grad_() for key, t in done.tensors.items() if ".lora_" in key}
    done.module()(arithmetic(5, 32)).square().sum().backward()
    assert all(bool(t.grad.any()) for t in factors.values() if t.grad is not None)
    assert all(t.grad is not None for t in factors.values())


def test_a_module_tree_is_left_as_it_is() -> None:
    program = compiled_from(capture(plain_mlp()), PACK)
    done = run_pipeline(program, (RewriteLinears(),))
    assert done.graph is None and done.facts == program.facts
    assert done.history[-1] == "rewrite-linears"


def test_rewriting_keeps_the_names_of_nodes_and_shapes() -> None:
    _, program = three_products()
    before = compiled_from(program, PACK)
    done = run_pipeline(before, (RewriteLinears(),))
    assert before.graph is not None and done.graph is not None
    kept = {node.name: node.meta.get("val") for node in done.graph.nodes}
    old = {node.name: node.meta.get("val") for node in before.graph.nodes}
    for site in done.sites:
        for name in site.nodes:
            assert kept[name].shape == old[name].shape
