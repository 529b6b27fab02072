"""The GPU kernels that a compiled model runs on, as source: nothing is built or run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lowra.backends.activations import get_activations
from lowra.backends.triton import integer
from lowra.backends.triton.build import source_of
from lowra.backends.triton.keys import Key, ValuesKey
from lowra.backends.triton.launch import product_key, reads_factor
from lowra.backends.triton.schedule import (
    FEW_TOKENS,
    MOST_FUSED_RANK,
    MOST_SHRUNK_RANK,
    choose,
    integer_choice,
    values_blocks,
)
from lowra.backends.triton.targets import TARGETS, Target
from lowra.backends.triton.weight import NAMES, Weight, declined, weight_of
from lowra.compiler.errors import RecipeError, nearest
from lowra.runtime.modules import QuantizedLinear

PROCESSORS = 132
"""Of the device that grids are chosen for where there is none: an H100 or H200."""


@dataclass(frozen=True)
class KernelSource:
    """One generated kernel, and the sites whose products it computes."""

    name: str
    sites: tuple[str, ...]
    source: str


def kernels_of(
    model: nn.Module, target: str = "sm90", tokens: int = 1
) -> tuple[list[KernelSource], dict[str, str]]:
    """Kernels of the products of `model` with so many tokens, by name, as the rules choose where
    nothing was tuned: one that multiplies, with one before it where `set_activations` has integers
    read, or one that unpacks where torch multiplies; and by site why there is none.

    Raises RecipeError for an unknown target.
    """
    chosen = next((known for known in TARGETS if known.name == target), None)
    if chosen is None:
        names = [known.name for known in TARGETS]
        raise RecipeError(f"target {target!r} is unknown; {nearest(target, names, len(names))}")
    sites: dict[str, list[str]] = {}
    sources: dict[str, str] = {}
    declines: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        packed = module.packed()
        why = declined(packed, module.dtype)
        if why is not None:
            declines[name] = why
            continue
        weight = weight_of(packed)
        for key in _product_keys(module, weight, tokens, chosen):
            sources[key.name] = sources.get(key.name) or source_of(key)
            sites.setdefault(key.name, []).append(name)
    made = [KernelSource(name, tuple(sites[name]), sources[name]) for name in sorted(sources)]
    return made, declines


def _product_keys(
    module: QuantizedLinear, weight: Weight, tokens: int, target: Target
) -> tuple[Key, ...]:
    name, bias = NAMES[module.dtype], module.bias is not None
    rank = module.rank if module.rank <= MOST_FUSED_RANK else 0
    factors = module.dtype if module.lora_B is None else module.lora_B.dtype
    own = tokens <= FEW_TOKENS and factors != module.dtype and reads_factor(factors, target)
    of = NAMES[factors] if own else ""
    kind = "float32" if module.dtype == torch.float32 else get_activations("cuda")
    fine = kind == "int16"
    takes = integer.takes(weight.key, weight.k, tokens, target)
    if kind.startswith("int") and takes and rank == module.rank:
        chosen = integer_choice(weight.panels, weight.k, tokens, fine, PROCESSORS)
        given = (weight, tokens, name, fine, target, rank, bias, chosen, of)
        return (
            integer.quantize_key(weight.key, name, fine, target), integer.product_key(*given)[0]
        )  # fmt: skip
    choice = choose(
        weight.key, weight.panels, weight.k, tokens, module.dtype, PROCESSORS, target
    )  # fmt: skip
    if choice.blocks is None:
        return (ValuesKey(target, weight.key, name, values_blocks()),)
    waits = tokens <= FEW_TOKENS and rank <= MOST_SHRUNK_RANK
    return (product_key(weight, tokens, name, target, rank, bias, waits, choice, of)[0],)
