"""Training through the module view: only A and B learn, and every run is the same run."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.compiled_models import low_llama


def student() -> nn.Module:
    return copy.deepcopy(low_llama().compiled).train()


def loss_of(model: nn.Module) -> Tensor:
    inputs = low_llama().inputs
    return cast("Any", model)(**inputs, labels=inputs["input_ids"]).loss


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad.clone() for name, p in factors(model).items() if p.grad is not None}


def train(model: nn.Module, optimizer: type[torch.optim.Optimizer], rate: float) -> list[float]:
    """The losses before each of 5 steps, and after the last."""
    steps = optimizer(factors(model).values(), lr=rate)  # pyright: ignore
    losses: list[float] = []
    for _ in range(5):
        steps.zero_grad()
        loss = loss_of(model)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return [*losses, loss_of(model).item()]


def test_only_the_factors_of_every_quantized_linear_require_grad() -> None:
    model = student()
    layers = low_llama().compiled.lowra.sites  # pyright: ignore
    expected = {f"{s.name}.{role}" for s in layers for role in ("lora_A", "lora_B")}
    assert set(factors(model)) == expected


def test_every_factor_gets_a_gradient_and_nothing_else_does() -> None:
    model = student()
    found = gradients(model)
    assert set(found) == set(factors(model))
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in found.values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_gradients_are_those_of_the_same_model_with_dense_weights() -> None:
    """Each quantized linear is replaced by its dequantized weight, in float64, and plain torch."""
    model = student().double()
    found = gradients(model)
    dense = copy.deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if hasattr(layer, "lora_A"):
            parent, _, leaf = name.rpartition(".")
            setattr(dense.get_submodule(parent), leaf, DenseLora(layer))
    expected = gradients(dense)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


class DenseLora(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.scaling = layer.weight, layer.scaling
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T


@pytest.mark.parametrize(
    ("optimizer", "rate"), [(torch.optim.SGD, 0.5), (torch.optim.Adam, 0.01)], ids=["sgd", "adam"]
)
def test_the_loss_falls_in_five_steps_and_the_base_keeps_its_bits(
    optimizer: type[torch.optim.Optimizer], rate: float
) -> None:
    model = student()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    losses = train(model, optimizer, rate)
    assert losses[-1] < losses[0]
    trained = set(factors(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name


def test_two_runs_from_the_same_start_are_identical() -> None:
    first, second = student(), student()
    assert train(first, torch.optim.Adam, 0.01) == train(second, torch.optim.Adam, 0.01)
    for name, factor in factors(first).items():
        assert torch.equal(factor, factors(second)[name])


def test_a_training_run_of_a_copy_leaves_the_compiled_model_alone() -> None:
    before = {name: t.clone() for name, t in low_llama().compiled.state_dict().items()}
    train(student(), torch.optim.SGD, 0.5)
    for name, tensor in low_llama().compiled.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "reentrant",
    [False, True],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    model = student()
    expected = gradients(model)
    checkpointed = cast("Any", model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    found = gradients(model)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_training_runs_under_bf16_autocast_with_float32_factors() -> None:
    model = student()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    exact = gradients(student())
    for name, factor in factors(model).items():
        assert factor.dtype == torch.float32
        assert factor.grad is not None and factor.grad.dtype == torch.float32
        cosine = nn.functional.cosine_similarity(factor.grad.flatten(), exact[name].flatten(), 0)
        assert cosine > 0.95, name


def test_a_quantized_linear_gives_bf16_under_autocast() -> None:
    model = cast("Any", student())
    layer = model.model.layers[0].mlp.gate_proj
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    assert layer(torch.randn(2, 64)).dtype == torch.float32


def test_a_bfloat16_model_trains_and_keeps_its_codebooks() -> None:
    model = student().to(torch.bfloat16)
    losses = train(model, torch.optim.SGD, 0.5)
    assert losses[-1] < losses[0]
    layer = cast("Any", model).model.layers[0].mlp.gate_proj
    dense = cast("Any", low_llama().compiled).model.layers[0].mlp.gate_proj
    assert torch.equal(layer.codebooks, dense.codebooks)
    assert torch.equal(layer.scales, dense.scales)
