"""Program facts -> the user's own model class with quantized layers; tensors are shared."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from lowra.compiler.correction import Correction
from lowra.compiler.facts import Adapter, Packed
from lowra.compiler.program import Program, Site
from lowra.compiler.storage import PackedWeight
from lowra.runtime.modules import QuantizedEmbedding, QuantizedLinear

AdapterFactors = tuple[Tensor, Tensor, float]


def build_module_view(model: nn.Module, program: Program) -> nn.Module:
    """A model of the same class with every compressed site in place; `model` stays as it was.

    Tensors that are not compressed are shared with `model`, but for those that the program has
    replaced (tuned norms and biases). Only LoRA factors require grad.
    """
    view = shallow_copy(model, {name: program.tensors[name] for name in program.replaced})
    for site in program.sites:
        packed = program.fact(site.name, Packed).weight
        adapter = program.find(site.name, Adapter)
        factors = None if adapter is None else (adapter.lora_a, adapter.lora_b, adapter.scaling)
        place(view, site, packed, factors, site.dtype, program.find(site.name, Correction))
    return view


NOTHING: Mapping[str, Tensor] = MappingProxyType({})


def shallow_copy(model: nn.Module, changed: Mapping[str, Tensor] = NOTHING) -> nn.Module:
    """A copy of the module tree that shares all tensors but those `changed`, by name; its
    parameters are frozen."""
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters():
        tensor = changed.get(name, parameter).detach()
        memo[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)


def place(
    model: nn.Module, site: Site, packed: PackedWeight, factors: AdapterFactors | None,
    dtype: torch.dtype, correction: Correction | None = None,
) -> None:  # fmt: skip
    """Put quantized layers in place of the modules of a site (and of embeddings tied to it)."""
    first: QuantizedLinear | None = None
    for name in site.modules:
        old = model.get_submodule(name)
        bias = cast("nn.Parameter | None", getattr(old, "bias", None))
        new = QuantizedLinear(packed, bias, dtype, factors, correction)
        if first is not None:
            new.lora_A, new.lora_B = first.lora_A, first.lora_B
        first = new
        new.train(old.training)
        _replace(model, name, new)
    for name in site.embeddings:
        old = cast("nn.Embedding", model.get_submodule(name))
        new = QuantizedEmbedding(packed, dtype, old, correction)
        _replace(model, name, new.train(old.training))


def put_adapter(model: nn.Module, site: Site, factors: AdapterFactors | None) -> None:
    """Give the modules of a site these factors, one pair for all, bit for bit; None: no adapter."""
    first, *others = (model.get_submodule(name) for name in site.modules)
    assert isinstance(first, QuantizedLinear)
    if factors is None:
        first.drop_adapter()
    else:
        first.set_adapter(*factors)
    for layer in others:
        assert isinstance(layer, QuantizedLinear)
        layer.lora_A, layer.lora_B, layer.scaling = first.lora_A, first.lora_B, first.scaling


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Every quantized linear of a compiled model, by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the block with every adapter switched off: the base alone."""
    layers = quantized_linears(model).values()
    before: Mapping[QuantizedLinear, bool] = {m: m.adapter_enabled for m in layers}
    try:
        for layer in before:
            layer.adapter_enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.adapter_enabled = enabled
