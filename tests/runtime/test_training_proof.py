"""Gradients against finite differences through a whole model, and training against plain peft."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowra.runtime.module_view import quantized_linears
from tests.runtime.compiled_models import end_to_end, low_llama

ROLES = ("lora_A", "lora_B", "codebooks", "scales")


def double_model(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A compiled model in float64, all of whose tables and factors ask for gradients.

    GPT-2: Llama's norm and loss round to float32 on their way.
    """
    case = end_to_end(name)
    model = copy.deepcopy(case.compiled).double()
    for layer in quantized_linears(model).values():
        layer.codebooks = layer.codebooks.double().requires_grad_()
        if layer.scales is not None:
            layer.scales = layer.scales.double().requires_grad_()
    return model, case.inputs


def loss_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs).logits
    labels = inputs["input_ids"][:, 1:].reshape(-1)
    return functional.cross_entropy(logits[:, :-1].reshape(len(labels), -1), labels)


@pytest.mark.parametrize("role", ROLES)
def test_gradients_through_a_whole_model_are_the_finite_differences(role: str) -> None:
    """Along random directions of every layer at once, and along those of one layer alone."""
    model, inputs = double_model("tiny_gpt2")
    layers = quantized_linears(model)
    tensors = {n: t for n, m in layers.items() if (t := getattr(m, role)) is not None}
    assert len(tensors) == len(layers)
    loss_of(model, inputs).backward()
    generator = torch.Generator().manual_seed(0)
    for names in (list(tensors), [next(iter(tensors))], [list(tensors)[-1]]):
        ways = {
            name: torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
            for name in names
        }
        analytic = sum(float((tensors[n].grad * way).sum()) for n, way in ways.items())  # pyright: ignore
        step = 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, way in ways.items():
                    tensors[name] += sign * step * way
                values.append(float(loss_of(model, inputs)))
                for name, way in ways.items():
                    tensors[name] -= sign * step * way
        numeric = (values[0] - values[1]) / (2 * step)
        assert abs(analytic) > 1e-9
        assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-9)


def dense_twin(compiled: Any) -> nn.Module:
    """The dense model with the dequantized weights of `compiled`, in float64."""
    twin = copy.deepcopy(low_llama().dense).double()
    for name, layer in quantized_linears(compiled).items():
        cast("Any", twin.get_submodule(name)).weight.data = layer.weight.detach().clone()
    return twin


def with_peft(twin: nn.Module, compiled: Any) -> Any:
    """`twin` under peft's LoRA, with the adapters of `compiled` for a start."""
    peft = pytest.importorskip("peft")
    layers = quantized_linears(compiled)
    first = next(iter(layers.values()))
    config = peft.LoraConfig(
        r=first.rank, lora_alpha=first.scaling * first.rank, target_modules=sorted(layers),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(twin, config)
    for name, layer in layers.items():
        module = model.get_submodule(f"base_model.model.{name}")
        for role in ("lora_A", "lora_B"):
            getattr(module, role)["default"].weight.data = getattr(layer, role).detach().clone()
    return model


def train(model: nn.Module, steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses before each step of AdamW, and the factors at the end, in the order of names."""
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-2)
    inputs = low_llama().inputs
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model.train(), inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [factors[name].detach() for name in sorted(factors)]


def test_training_follows_peft_on_the_dequantized_model_step_by_step() -> None:
    model = copy.deepcopy(low_llama().compiled).double()
    other = with_peft(dense_twin(model), model)
    found, factors = train(model, 12)
    expected, others = train(other, 12)
    assert found[-1] < found[0] - 0.1
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(factors) == len(others)
    for one, two in zip(factors, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_weights_size_waits_for_backward(checkpointing: bool) -> None:
    """The packed tensors do, of course; a dense weight would have n * k floating elements.

    17 tokens, so that no activation has the size of a weight.
    """
    model = copy.deepcopy(end_to_end("tiny_gpt2").compiled).train()
    if checkpointing:
        cast("Any", model).gradient_checkpointing_enable({"use_reentrant": False})
    sizes = {layer.n * layer.k for layer in quantized_linears(model).values()}
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.dtype != torch.float16:
            kept.add(tensor.numel())
        return tensor

    ids = torch.randint(3, 128, (1, 17))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, {"input_ids": ids})
    assert kept and not kept & sizes
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))
    }
