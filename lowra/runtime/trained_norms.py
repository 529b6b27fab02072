"""Norms that train in float32 within a model of halves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

STORED = "lowra_stored_dtypes"
"""Attribute of a norm in training: by parameter, the dtype that it had and will be saved in."""


def hold_norm(norm: nn.Module, dtype: torch.dtype) -> None:
    """Hold the parameters of `norm` in `dtype`; it still returns what its input is in."""
    stored = norm.__dict__.setdefault(STORED, {})
    for name, parameter in norm.named_parameters(recurse=False):
        stored.setdefault(name, parameter.dtype)
        parameter.data = parameter.data.to(dtype)
    if not any(hook is _as_input for hook in norm._forward_hooks.values()):
        norm.register_forward_hook(_as_input)


def mark_trained(model: nn.Module, names: Iterable[str]) -> None:
    """Name norms of a loaded model that had trained, or were made ready to, before it was saved.
    Raises AttributeError for a name that is no module."""
    for name in names:
        norm = model.get_submodule(name)
        stored = {key: parameter.dtype for key, parameter in norm.named_parameters(recurse=False)}
        norm.__dict__.setdefault(STORED, stored)


def held_norms(model: nn.Module) -> list[str]:
    """The norms that trained, or were made ready to, here or before they were saved."""
    return [name for name, module in model.named_modules() if STORED in module.__dict__]


def _as_input(_norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """A norm whose weight is in float32 would make the rest of a bfloat16 model float32."""
    given = inputs[0] if inputs else None
    if isinstance(given, Tensor) and isinstance(output, Tensor) and given.is_floating_point():
        return output.to(given.dtype)
    return output


def as_stored(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with trained norms rounded to the dtypes that they had."""
    dtypes = {
        f"{owner}.{name}" if owner else name: dtype
        for owner, module in model.named_modules()
        for name, dtype in module.__dict__.get(STORED, {}).items()
    }
    return {name: t.to(dtypes[name]) if name in dtypes else t for name, t in state.items()}
