"""What a merge costs is the divergence from the model with its adapter."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from torch.nn import functional

import lowra
from lowra.runtime.dense_view import build_dense_view
from lowra.runtime.module_view import adapters_disabled, quantized_linears
from lowra.workflows.merge_cost import merge_cost
from tests.models import VOCAB
from tests.runtime.compiled_models import low_llama

TOKENS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))


def adapted() -> torch.nn.Module:
    model = copy.deepcopy(low_llama().compiled)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in quantized_linears(model).values():
            cast("torch.Tensor", layer.lora_B).normal_(std=0.5)
    return model


def test_a_dense_merge_costs_nothing_and_the_adapters_worth_is_that_of_leaving_it_out() -> None:
    model = adapted()
    cost = merge_cost(model, build_dense_view(model), TOKENS)
    assert cost.kl == pytest.approx(0, abs=1e-6)
    assert cost.merged_perplexity == pytest.approx(cost.perplexity, rel=1e-4)
    with torch.no_grad():
        wanted = model(TOKENS).logits[:, :-1].log_softmax(-1)
        with adapters_disabled(model):
            found = model(TOKENS).logits[:, :-1].log_softmax(-1)
    expected = functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()
    assert cost.adapter_kl == pytest.approx(expected.item(), rel=1e-4)
    assert cost.adapter_kl > 0.01
    assert cost.tokens == 2 * 23
    assert all(layer.adapter_enabled for layer in quantized_linears(model).values())


def test_compiling_the_merged_weights_anew_loses_something_within_the_same_budget() -> None:
    model = adapted()
    merged = lowra.merge_adapter(model)
    assert type(merged) is type(model)
    assert all(layer.rank == 0 for layer in quantized_linears(merged).values())
    totals = merged.lowra.report["totals"]  # pyright: ignore
    assert totals["adapter_bits"] == 0
    assert totals["stored_bits"] <= model.lowra.recipe["bit_budget"]  # pyright: ignore
    cost = merge_cost(model, merged, TOKENS)
    assert 0 < cost.kl < cost.adapter_kl
