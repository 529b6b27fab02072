"""Adapters of PEFT and compiled models to put them on, for tests that have peft at hand."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lowra
from tests import models
from tests.runtime.compiled_models import EIGHT, Case, compile_case, one_layer_llama

TARGETS = ["q_proj", "down_proj"]


@functools.cache
def bare_llama() -> Case:
    """A llama of one layer, compiled without an adapter."""
    return compile_case(one_layer_llama, **{**EIGHT, "rank": 0, "widths": (2, 4), "bit_budget": 5})


@functools.cache
def bare_gpt2() -> Case:
    """A GPT-2, whose dense layers are Conv1D, compiled without an adapter."""
    return compile_case(models.tiny_gpt2, **{**EIGHT, "rank": 0})


def own(model: nn.Module) -> Any:
    """A copy to change."""
    return copy.deepcopy(model)


def config(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options})


def adapted(model: nn.Module, **options: Any) -> peft.PeftModel:
    """PEFT's layers around a copy of `model`, with factors that do something."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(own(model), config(**options))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return wrapped


def saved(model: peft.PeftModel, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the names of the modules they stand around."""
    found = (item for item in model.named_modules() if hasattr(item[1], "base_layer"))
    return {name.removeprefix("base_model.model."): layer for name, layer in found}


def logits(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        return model(**case.inputs).logits


def shifted(case: Case) -> nn.Module:
    """A copy of a compiled model whose adapter is no longer the one it started with."""
    model = own(case.compiled)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def load(model: nn.Module, folder: Path, **options: Any) -> Any:
    """`lowra.load_adapter` on a copy."""
    return lowra.load_adapter(own(model), folder, **options)
