"""Dense models that compute what a compiled model and its adapter do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lowra.compiler.errors import AdapterError
from lowra.runtime.compiled import compiled
from lowra.runtime.dense_view import build_dense_view
from lowra.runtime.module_view import quantized_linears
from tests.runtime.compiled_models import (
    Case,
    compiled_stack,
    end_to_end,
    half_llama,
    low_llama,
    output,
    tied_llama,
    tied_llama_with_head,
)


def trained(case: Case) -> Any:
    """A copy whose adapter does something."""
    model = copy.deepcopy(case.compiled)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in quantized_linears(model).values():
            layer.lora_B.add_(torch.randn_like(layer.lora_B), alpha=0.1)  # pyright: ignore
    return model


@pytest.mark.parametrize(
    "case",
    [low_llama, tied_llama, *(lambda n=n: end_to_end(n) for n in ("tiny_gpt2", "tiny_bart"))],
    ids=["llama", "tied", "gpt2", "bart"],
)
def test_a_dense_view_computes_what_the_adapted_model_does(case: Any) -> None:
    model = trained(case())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    dense = build_dense_view(model)
    assert type(dense) is type(case().dense) and compiled(dense) is None
    assert not quantized_linears(dense)
    inputs = case().inputs
    torch.testing.assert_close(output(dense, inputs), output(model, inputs), rtol=1e-3, atol=1e-4)
    assert set(dense.state_dict()) == set(case().dense.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_dense_view_keeps_dtypes_and_adds_before_it_rounds() -> None:
    model = trained(half_llama())
    dense = build_dense_view(model)
    for name, layer in quantized_linears(model).items():
        weight = dense.get_submodule(name).weight
        delta = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())  # pyright: ignore
        assert torch.equal(weight, (layer.weight.float() + delta).to(torch.bfloat16))


def test_an_adapter_on_a_head_that_is_also_the_embedding_is_not_merged() -> None:
    with pytest.raises(AdapterError, match="lm_head shares its weight with model.embed_tokens"):
        build_dense_view(trained(tied_llama_with_head()))


def test_plain_modules_and_models_without_an_adapter_are_refused() -> None:
    with pytest.raises(AdapterError, match="only a compiled Hugging Face model"):
        build_dense_view(compiled_stack().compiled)
    model = copy.deepcopy(low_llama().compiled)
    for layer in quantized_linears(model).values():
        layer.drop_adapter()
    with pytest.raises(AdapterError, match="no adapter to merge"):
        build_dense_view(model)
