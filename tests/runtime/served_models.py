"""Adapters of every kind that a folder can hold, and pools to serve them from."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lowra
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.serving.pool import AdapterPool
from tests import models
from tests.runtime.compiled_models import EIGHT, Case, compile_case
from tests.runtime.peft_models import adapted, bare_llama, own, saved

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "dora": {"use_dora": True, "target_modules": ["v_proj", "up_proj"]},
    "wide": {
        "r": 9,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"k_proj": 2},
    },
}

CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 2e-4}
"""How far logits computed in another order may be off."""


def _vera(model: nn.Module) -> peft.PeftModel:
    config = peft.VeraConfig(r=5, target_modules=["q_proj", "v_proj"], d_initial=0.3)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wrapped = peft.get_peft_model(own(model), config)
        for name, parameter in wrapped.named_parameters():
            if "vera_lambda_b" in name:
                parameter.normal_(std=0.5)
    return wrapped


def wrapped(kind: str, model: nn.Module) -> peft.PeftModel:
    """PEFT's layers around a copy of a model, and its own adapter left as it is."""
    return _vera(model) if kind == "vera" else adapted(model, **KINDS[kind])


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="lowra-adapters-"))


@functools.cache
def folder(kind: str) -> Path:
    """An adapter of the bare llama as PEFT, or `compress_adapter` ("packed-..."), writes it."""
    path = _folder() / kind
    if kind.startswith("packed-"):
        lowra.compress_adapter(folder(kind.removeprefix("packed-")), path, bit_budget=2.2)
        return path
    return saved(wrapped(kind, bare_llama().compiled), path)


@functools.cache
def alone(kind: str) -> nn.Module:
    """The bare llama with one adapter, by PEFT or `load_adapter`: what a pool must equal."""
    if kind.startswith("packed-"):
        plain = lowra.export_adapter(folder(kind), _folder() / f"plain-{kind}")
        return lowra.load_adapter(own(bare_llama().compiled), plain)
    return wrapped(kind, bare_llama().compiled)


ALL = ("lora", "rslora", "dora", "wide", "vera", "packed-lora", "packed-wide")


def pool_of(model: nn.Module, *kinds: str, pages: int = 400, page_bytes: int = 1024) -> AdapterPool:
    pool = AdapterPool(model, pages * page_bytes, page_bytes=page_bytes)
    for kind in kinds:
        pool.add(kind, folder(kind))
    return pool


def run(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def ids_of(batch: int, length: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 100, (batch, length), generator=generator)


@functools.cache
def llama() -> Case:
    """The bare llama that pools serve: a copy, as `alone` may copy the first within a batch."""
    return replace(bare_llama(), compiled=own(bare_llama().compiled))


@functools.cache
def biased_llama() -> Case:
    """A llama of two layers whose linears have biases, compiled without an adapter."""
    return compile_case(_biased, **{**EIGHT, "rank": 0})


def _biased() -> nn.Module:
    config = models.tiny_llama().config
    config.attention_bias = config.mlp_bias = True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = type(models.tiny_llama())(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def in_memory(model: Any, seed: int) -> dict[str, Any]:
    """Factors of every linear of a model, in float16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).half()

    layers = quantized_linears(model).items()
    return {name: (normal(3, layer.k), normal(layer.n, 3), 1.0) for name, layer in layers}
