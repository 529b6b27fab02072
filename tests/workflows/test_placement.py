"""Models on other devices: "meta" stands for one, since it takes tensors and gives none back."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import lowra
from lowra.runtime.modules import QuantizedLinear
from lowra.workflows import placement
from tests import models

META = torch.device("meta")


def test_a_model_on_the_cpu_is_not_copied() -> None:
    model = nn.Linear(3, 2)
    assert placement.on_cpu(model) is model and placement.put_like(model, model) is model


def test_a_copy_has_the_values_and_ties_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny_llama(tied=True, layers=1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(placement, "CPU", torch.device("cpu", 0))  # as if it were another one
    moved = placement.on_cpu(model)
    assert moved is not model and type(moved) is type(model) and moved.training
    assert moved.lm_head.weight is moved.model.embed_tokens.weight
    for name, tensor in moved.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not any(p.requires_grad for p in moved.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_result_is_put_where_the_original_is(caplog: pytest.LogCaptureFixture) -> None:
    original, made = nn.Linear(3, 2).to(META), nn.Linear(3, 2)
    assert placement.devices_of(placement.put_like(made, original)) == {META}
    spread = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3).to(META))
    made = nn.Linear(3, 2)
    with caplog.at_level(logging.WARNING):
        assert placement.devices_of(placement.put_like(made, spread)) == {placement.CPU}
    assert "stays on the CPU" in caplog.text


def test_hooks_of_accelerate_stay_behind() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(3, 2))
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook("cpu"))
    model.register_buffer("elsewhere", torch.zeros(1, device=META), persistent=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lambda tensor, *_: torch.zeros(tensor.shape))
        moved = placement.on_cpu(model)
    assert not hasattr(moved[0], "_hf_hook") and hasattr(model[0], "_hf_hook")


def test_compiling_puts_the_model_on_the_device_of_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The original is on the CPU here, and said to be on another device."""
    model = models.tiny_llama(layers=1)
    own = copy.deepcopy(model)
    real = placement.devices_of
    monkeypatch.setattr(placement, "devices_of", lambda m: {META} if m is model else real(m))
    made = lowra.compile(model, bit_budget=100, calibration_tokens=256, context=64)
    packed = [layer for layer in made.modules() if isinstance(layer, QuantizedLinear)]
    assert packed and real(made) == {META} and real(model) == {placement.CPU}
    assert made.lowra.report["totals"]["stored_bits"] > 0
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_factors_go_where_the_codes_are() -> None:
    model = lowra.compile(models.tiny_llama(layers=1), bit_budget=100, preset="lowra")
    layer = next(m for m in model.modules() if isinstance(m, QuantizedLinear)).to(META)
    layer.set_adapter(torch.zeros(2, layer.k), torch.zeros(layer.n, 2), 1.0)
    assert layer.lora_A is not None and layer.lora_A.device == META
