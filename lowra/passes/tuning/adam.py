"""Adam (arXiv 1412.6980) on a few named tensors, whose whole state is tensors, so that it can be
written to disk."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BETAS = (0.9, 0.95)
EPSILON = 1e-12


class Adam:
    """`values` by name are trained; each starts at zero."""

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.values = {name: torch.zeros(s).requires_grad_() for name, s in shapes.items()}
        self.mean = {name: torch.zeros(s) for name, s in shapes.items()}
        self.square = {name: torch.zeros(s) for name, s in shapes.items()}
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step along the gradients, which are cleared."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in BETAS)
        for name, value in self.values.items():
            if value.grad is None:
                continue
            self.mean[name].lerp_(value.grad, 1 - BETAS[0])
            self.square[name].lerp_(value.grad.square(), 1 - BETAS[1])
            size = (self.square[name] / second).sqrt_().add_(EPSILON)
            value.sub_(self.mean[name] / size, alpha=rate / first)
            value.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything, by name."""
        made = {"steps": torch.tensor(self.steps)}
        for kind, tensors in (("value", self.values), ("mean", self.mean), ("square", self.square)):
            made |= {f"{kind}/{name}": t.detach().clone() for name, t in tensors.items()}
        return made

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.steps = int(state["steps"])
        for kind, tensors in (("value", self.values), ("mean", self.mean), ("square", self.square)):
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{kind}/{name}"])
