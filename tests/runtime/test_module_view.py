"""The module view: the user's own class, tied weights tied, and the dense model left alone."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn

import lowra
from lowra.runtime.module_view import adapters_disabled, quantized_linears
from lowra.runtime.modules import QuantizedEmbedding, QuantizedLinear
from tests import models
from tests.runtime.compiled_models import (
    Case,
    compile_case,
    compiled_stack,
    end_to_end,
    half_llama,
    low_llama,
    output,
    stack,
    tied_llama,
    tied_llama_with_head,
)


def test_compile_gives_the_same_class_with_every_site_replaced() -> None:
    case = low_llama()
    assert type(case.compiled) is type(case.dense)
    assert set(quantized_linears(case.compiled)) == {
        site.name for site in cast("Any", case.compiled).lowra.sites
    }


@pytest.mark.parametrize("case", [low_llama, compiled_stack], ids=["llama", "stack"])
def test_compile_leaves_the_dense_model_as_it_was(case: Any) -> None:
    made: Case = case()
    state = made.dense.state_dict()
    assert list(state) == list(made.before)
    assert all(torch.equal(state[name], tensor) for name, tensor in made.before.items())
    assert all(p.requires_grad for p in made.dense.parameters())
    assert not made.dense.training
    assert not quantized_linears(made.dense)
    assert "lowra" not in made.dense.__dict__
    assert torch.equal(output(made.dense, made.inputs), output(made.build(), made.inputs))


def test_the_dense_model_still_trains_after_compile() -> None:
    case = compile_case(stack, bit_budget=6, rank=2)
    case.dense(*case.inputs.values()).sum().backward()
    assert all(p.grad is not None for p in case.dense.parameters())
    before = output(case.compiled, case.inputs)
    with torch.no_grad():
        cast("Any", case.dense).first.weight.zero_()
    assert torch.equal(output(case.compiled, case.inputs), before)


def test_compile_keeps_the_training_flag_of_every_module() -> None:
    dense = stack().train()
    dense.last.eval()
    compiled = lowra.compile(
        dense, example=tuple(models.tokens(dense).values()), bit_budget=6, rank=2
    )
    flags = {name: module.training for name, module in dense.named_modules()}
    assert flags == {"": True, "first": True, "middle": True, "last": False, "norm": True}
    assert {name: module.training for name, module in compiled.named_modules()} == flags


def test_parameters_that_are_not_compressed_share_their_storage_with_the_dense_model() -> None:
    case = compiled_stack()
    dense, compiled = cast("Any", case.dense), cast("Any", case.compiled)
    assert compiled.norm.weight.data_ptr() == dense.norm.weight.data_ptr()
    assert not compiled.norm.weight.requires_grad


def test_adapters_disabled_runs_the_base_alone_and_switches_back() -> None:
    case = low_llama()
    before = output(case.compiled, case.inputs)
    info = cast("Any", case.compiled).lowra
    with info.adapters_disabled(case.compiled):
        base = output(case.compiled, case.inputs)
        assert not any(m.adapter_enabled for m in quantized_linears(case.compiled).values())
    assert not torch.equal(base, before)
    assert torch.equal(output(case.compiled, case.inputs), before)
    silent = copy.deepcopy(case.compiled)
    with torch.no_grad():
        for layer in quantized_linears(silent).values():
            cast("torch.Tensor", layer.lora_B).zero_()
    torch.testing.assert_close(output(silent, case.inputs), base)


def test_adapters_disabled_switches_back_after_an_error_and_keeps_what_was_off() -> None:
    model = copy.deepcopy(compiled_stack().compiled)
    cast("Any", model).first.adapter_enabled = False
    with pytest.raises(ZeroDivisionError), adapters_disabled(model):
        raise ZeroDivisionError
    enabled = {name: layer.adapter_enabled for name, layer in quantized_linears(model).items()}
    assert enabled == {"first": False, "middle": True, "last": True}


def test_a_tied_head_that_is_skipped_stays_tied() -> None:
    model = cast("Any", tied_llama().compiled)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear


def test_an_included_tied_head_is_quantized_with_its_embedding() -> None:
    case = tied_llama_with_head()
    model = cast("Any", case.compiled)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert type(head) is QuantizedLinear
    assert type(embedding) is QuantizedEmbedding
    assert head.codes is embedding.codes and head.codebooks is embedding.codebooks
    assert torch.equal(head.weight, embedding.weight)
    dense = output(case.dense, case.inputs)
    assert (output(model, case.inputs) - dense).norm() < 0.03 * dense.norm()


def test_an_included_tied_head_counts_once_in_the_totals() -> None:
    head, plain = tied_llama_with_head().compiled.lowra.report, tied_llama().compiled.lowra.report  # pyright: ignore
    assert head["totals"]["sites"] == plain["totals"]["sites"] + 1
    assert head["totals"]["weights"] == plain["totals"]["weights"] + models.VOCAB * 64
    assert [s["name"] for s in head["sites"]].count("lm_head") == 1
    assert head["skipped"] == []
    assert head["totals"]["bytes"] == sum(site["bytes"] for site in head["sites"])


@pytest.mark.parametrize("name", ["tiny_t5", "tiny_bart", "tiny_bert", "tiny_gpt2"])
def test_a_tied_head_that_is_skipped_stays_tied_in_every_family(name: str) -> None:
    model = cast("Any", end_to_end(name).compiled)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_two_linears_on_one_weight_share_one_adapter() -> None:
    case = compile_case(Twins, bit_budget=20, widths=(8,), rank=2)
    model = cast("Any", case.compiled)
    assert model.one.lora_A is model.two.lora_A
    assert model.one.lora_B is model.two.lora_B
    assert torch.equal(model.one.weight, model.two.weight)
    assert not torch.equal(model.one.bias, model.two.bias)
    dense = output(case.dense, case.inputs)
    assert (output(model, case.inputs) - dense).norm() < 0.02 * dense.norm()


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)))


def test_a_deep_copy_of_a_compiled_model_trains_apart_and_keeps_the_compile() -> None:
    case = compiled_stack()
    twin = copy.deepcopy(case.compiled)
    assert cast("Any", twin).lowra is cast("Any", case.compiled).lowra
    before = output(case.compiled, case.inputs)
    with torch.no_grad():
        for layer in quantized_linears(twin).values():
            cast("torch.Tensor", layer.lora_B).add_(1)
    assert torch.equal(output(case.compiled, case.inputs), before)
    assert not torch.equal(output(twin, case.inputs), before)


def test_rank_zero_makes_a_model_without_trainable_parameters() -> None:
    case = compile_case(stack, bit_budget=6, rank=0)
    assert not [p for p in case.compiled.parameters() if p.requires_grad]
    assert output(case.compiled, case.inputs).shape == output(case.dense, case.inputs).shape


def test_a_bfloat16_model_computes_in_bfloat16() -> None:
    case = half_llama()
    logits, expected = output(case.compiled, case.inputs), output(case.dense, case.inputs)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).float().norm() < 0.03 * expected.float().norm()
    layer = cast("Any", case.compiled).model.layers[0].self_attn.q_proj
    assert layer.lora_A.dtype == torch.bfloat16
    assert layer.codebooks.dtype == torch.float16
