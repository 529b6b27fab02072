"""The GPU kernels that a compiled model runs on, as source: nothing is built or run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lowra.backends.triton.build import source_of
from lowra.backends.triton.keys import LinearKey, ValuesKey
from lowra.backends.triton.launch import product_key
from lowra.backends.triton.schedule import MOST_FUSED_RANK, choose, values_blocks
from lowra.backends.triton.targets import TARGETS, Target
from lowra.backends.triton.weight import NAMES, Weight, declined, weight_of
from lowra.compiler.errors import RecipeError, nearest
from lowra.runtime.modules import QuantizedLinear

PROCESSORS = 132
"""Of the device that grids are chosen for where there is none: an H100 or H200."""
FEW_TOKENS = 16


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
    nothing was tuned: one that multiplies, or one that unpacks where torch does; and by site why
    there is none. Raises RecipeError for an unknown target."""
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
        key = _product_key(module, weight, tokens, chosen)
        sources[key.name] = sources.get(key.name) or source_of(key)
        sites.setdefault(key.name, []).append(name)
    made = [KernelSource(name, tuple(sites[name]), sources[name]) for name in sorted(sources)]
    return made, declines


def _product_key(
    module: QuantizedLinear, weight: Weight, tokens: int, target: Target
) -> LinearKey | ValuesKey:
    given = (weight.key, weight.panels, weight.k, tokens, module.dtype)
    choice = choose(*given, PROCESSORS, target)
    name = NAMES[module.dtype]
    if choice.blocks is None:
        return ValuesKey(target, weight.key, name, values_blocks())
    rank = module.rank if module.rank <= MOST_FUSED_RANK else 0
    waits, bias = tokens <= FEW_TOKENS, module.bias is not None
    return product_key(weight, tokens, name, target, rank, bias, waits, choice)[0]
