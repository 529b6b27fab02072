"""E[x_i^2] of every site's input over the calibration text: llama.cpp's importance of a column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.quality.protocol import Task
from lowra.workflows.models import inference


def column_energy(task: Task) -> dict[str, Tensor]:
    """By site, float32 [k], every value positive; remembered with the task."""
    known = task.__dict__.get("column_energy")
    if known is None:
        known = task.__dict__["column_energy"] = _measure(task)
    return known


def _measure(task: Task) -> dict[str, Tensor]:
    sums = {name: torch.zeros(site.in_features) for name, site in task.sites.items()}

    def adder(name: str):
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].float().flatten(0, -2)
            sums[name] += x.square().sum(0)

        return add

    hooks = [s.register_forward_pre_hook(adder(name)) for name, s in task.sites.items()]
    try:
        with inference(task.model):
            for window in task.calibration.split(1):
                task.model(window, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (s / task.calibration.numel()).clamp_(min=1e-10) for name, s in sums.items()}
