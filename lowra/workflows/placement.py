"""Models on other devices than the CPU, where the compiler works: a copy there, and back."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

log = logging.getLogger("lowra")
CPU = torch.device("cpu")


def devices_of(model: nn.Module) -> set[torch.device]:
    """Where the parameters and buffers of a model lie."""
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


def on_cpu(model: nn.Module) -> nn.Module:
    """The model where all of it is on the CPU, else a copy that is, without room on the device.

    Hooks of accelerate, which move inputs between devices, do not come along.
    """
    devices = devices_of(model) - {CPU}
    if not devices:
        return model
    log.info("compiling on the CPU, from %s", ", ".join(sorted(map(str, devices))))
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        moved = nn.Parameter(parameter.detach().to(CPU), requires_grad=False)
        memo[id(parameter)] = moved
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to(CPU)
    moved_model = copy.deepcopy(model, memo)
    if any(hasattr(module, "_hf_hook") for module in moved_model.modules()):
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(moved_model, recurse=True)
    return moved_model


def put_like(model: nn.Module, original: nn.Module) -> nn.Module:
    """`model`, made of `on_cpu(original)`, on the device of `original`.

    It stays on the CPU where that is on several: its parts are smaller now, and may be placed anew.
    """
    devices = devices_of(original)
    if len(devices) > 1:
        log.warning(
            "the original is on %s; the compiled model stays on the CPU: place it with .to()",
            ", ".join(sorted(map(str, devices))),
        )
        return model
    return model.to(devices.pop()) if devices else model
