"""The adapter of a compiled model, and what lies under it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowra.compiler.errors import AdapterError
from lowra.runtime.adapter_files import Base
from lowra.runtime.compiled import Compiled
from lowra.runtime.manifest import checksum
from lowra.runtime.module_view import AdapterFactors, quantized_linears
from lowra.runtime.modules import QuantizedLinear
from lowra.runtime.trained_tables import is_offset


def factors_of(model: nn.Module) -> dict[str, AdapterFactors]:
    """The factors and scaling of every adapted layer by module name; shares its tensors."""
    return {
        name: (layer.lora_A, layer.lora_B, layer.scaling)
        for name, layer in quantized_linears(model).items()
        if layer.lora_A is not None and layer.lora_B is not None
    }


def dropout_of(model: nn.Module) -> float:
    """The share of an adapter's inputs that training drops, the largest of all adapted layers."""
    layers = quantized_linears(model).values()
    return max((layer.dropout for layer in layers if layer.lora_A is not None), default=0.0)


def layers_of(model: nn.Module, info: Compiled) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized layer of every site, by the site's name, whatever is wrapped around it.

    Sorted by name: a checkpoint keeps no other order.
    """
    for site in sorted(info.sites, key=lambda site: site.name):
        layer = model.get_submodule(site.modules[0])
        while not isinstance(layer, QuantizedLinear) and hasattr(layer, "base_layer"):
            layer = layer.get_submodule("base_layer")
        assert isinstance(layer, QuantizedLinear)
        yield site.name, layer


def base_of(model: nn.Module, info: Compiled, *, with_adapter: bool = False) -> Base:
    """The fingerprints of what an adapter of `model` stands on: the packed tensors of all sites
    and, for one on top of the model's own adapter, that one."""
    digest = hashlib.sha256()
    for name, layer in layers_of(model, info):
        for role, tensor in sorted(_under(layer, with_adapter).items()):
            digest.update(f"{name}.{role} {checksum(tensor)}\n".encode())
        if with_adapter and layer.rank:
            digest.update(f"{name}.scaling {layer.scaling!r}\n".encode())
    return Base(info.fingerprint, digest.hexdigest())


def _under(layer: QuantizedLinear, with_adapter: bool) -> dict[str, Tensor]:
    """Tables in training as they are rounded: an adapter belongs to what it trained beside."""
    left_out = ("bias",) if with_adapter else ("bias", "lora_A", "lora_B")
    state = layer.state_dict()
    return {r: t for r, t in state.items() if r not in left_out and not is_offset(f".{r}")}


def is_wrapped(model: nn.Module, info: Compiled) -> bool:
    """Whether other layers, such as PEFT's, stand around some of the compiled ones."""
    names = (name for site in info.sites for name in site.modules)
    return not all(isinstance(model.get_submodule(name), QuantizedLinear) for name in names)


def require_unwrapped(model: nn.Module, info: Compiled) -> None:
    """Raise AdapterError for a model whose layers PEFT has wrapped."""
    if is_wrapped(model, info):
        raise AdapterError(
            "peft has put its layers around those of this model: save its adapter with "
            "lowra.save_adapter or save_pretrained, and take the model back with .unload()"
        )


@torch.no_grad()
def stacked(below: AdapterFactors | None, above: AdapterFactors) -> AdapterFactors:
    """One adapter that computes the sum of two. The upper B is scaled, so it rounds once more."""
    if below is None:
        return above
    (a, b, scaling), (upper_a, upper_b, upper_scaling) = below, above
    dtype = torch.promote_types(a.dtype, upper_a.dtype)
    scaled = upper_b.to(b.device, torch.float64) * (upper_scaling / scaling)
    return (
        torch.cat((a.to(dtype), upper_a.to(a.device, dtype))),
        torch.cat((b.to(dtype), scaled.to(dtype)), dim=1),
        scaling,
    )
