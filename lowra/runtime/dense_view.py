"""A compiled model with its adapter -> a dense model of the same class."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lowra.compiler.capture import tied_names
from lowra.compiler.errors import AdapterError
from lowra.runtime.adapter_view import factors_of, require_unwrapped
from lowra.runtime.checkpoint_reader import unfilled
from lowra.runtime.compiled import Compiled, compiled
from lowra.runtime.modules import QuantizedLinear
from lowra.runtime.quantized_module import QuantizedModule

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def build_dense_view(model: M) -> M:
    """A dense model that computes what `model` does, its adapter merged into the weights.

    W + C + s B A is summed in float32 and rounded to the layer's dtype. What was not compressed is
    shared with `model`. Raises AdapterError for a model without an adapter, and for one without a
    Hugging Face config.
    """
    info = compiled(model)
    if info is None or not hasattr(model, "config"):
        raise AdapterError(
            "only a compiled Hugging Face model can be built anew with merged weights; "
            "peft's merge_and_unload merges into dense models"
        )
    require_unwrapped(model, info)
    if not factors_of(model):
        raise AdapterError("this model has no adapter to merge: load one first")
    _require_own_weights(model, info)
    dense = unfilled(type(model), copy.deepcopy(cast("Any", model).config))
    if getattr(model, "generation_config", None) is not None:
        dense.generation_config = copy.deepcopy(cast("Any", model).generation_config)
    _load(dense, _dense_state(model, info))
    _copy_buffers(dense, model)
    return cast("M", dense.requires_grad_(False).eval())


def _require_own_weights(model: nn.Module, info: Compiled) -> None:
    """Raise AdapterError where an adapted weight is read by an embedding, too."""
    for site in info.sites:
        layer = model.get_submodule(site.modules[0])
        if site.embeddings and isinstance(layer, QuantizedLinear) and layer.rank:
            raise AdapterError(
                f"{site.name} shares its weight with {site.embeddings[0]}, which its adapter must "
                "not change: it cannot be merged; train without an adapter on it"
            )


def _dense_state(model: nn.Module, info: Compiled) -> dict[str, Tensor]:
    """Parameters and buffers by the names of the dense model."""
    packed = [n for n, m in model.named_modules() if isinstance(m, QuantizedModule)]
    inside = tuple(f"{name}." for name in packed)
    biases = {f"{name}.bias" for name in packed}
    state = {
        name: tensor.detach()
        for name, tensor in model.state_dict().items()
        if name in biases or not name.startswith(inside)
    }
    for site in info.sites:
        layer = model.get_submodule(site.modules[0])
        assert isinstance(layer, QuantizedLinear)
        merged = _merged(layer)
        state[site.weight] = merged.T.contiguous() if site.transposed else merged
    return state


def _merged(layer: QuantizedLinear) -> Tensor:
    if layer.lora_A is None or layer.lora_B is None:
        return layer.dequantize()
    delta = layer.scaling * (layer.lora_B.float() @ layer.lora_A.float())
    return (layer.weight.float() + delta).to(layer.dtype)


def _load(dense: nn.Module, state: dict[str, Tensor]) -> None:
    """Load by name; tied weights are given once."""
    first = tied_names(dense)
    given = {first.get(name, name): tensor for name, tensor in state.items()}
    result = dense.load_state_dict(given, strict=False, assign=True)
    missing = [n for n in result.missing_keys if first.get(n, n) not in given]
    if missing or result.unexpected_keys:
        raise AdapterError(f"cannot build a dense model: {[*missing, *result.unexpected_keys][0]}")
    cast("Any", dense).tie_weights()


def _copy_buffers(dense: nn.Module, model: nn.Module) -> None:
    """Those that no state dict holds, too, such as rotary frequencies."""
    own = dict(model.named_buffers())
    for name, buffer in dense.named_buffers():
        if name in own and own[name].shape == buffer.shape:
            owner, _, leaf = name.rpartition(".")
            setattr(dense.get_submodule(owner), leaf, own[name])
