"""What optimisers of adapters share: pairs of factors, and AdamW for whatever else trains."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

OTHERS_RATE = 2e-4
BETAS, EPSILON = (0.9, 0.999), 1e-8


class Pair(NamedTuple):
    """The factors of one adapter, whose product b a [n, k] is what counts."""

    a: Tensor
    """[r, k], `lora_A`."""
    b: Tensor
    """[n, r], `lora_B`."""


def pairs_of(model: nn.Module) -> tuple[list[Pair], list[Tensor]]:
    """The pairs of factors that train in a model, lowra's or peft's, and whatever else trains.

    Raises ValueError for a factor that trains without its partner, or that does not fit it.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pairs: list[Pair] = []
    for name in [name for name in named if "lora_A" in name]:
        partner = name.replace("lora_A", "lora_B")
        if partner not in named:
            raise ValueError(f"{name} trains, and {partner} does not: train both or neither")
        pair = Pair(named.pop(name), named.pop(partner))
        if pair.a.dim() != 2 or pair.b.dim() != 2 or pair.a.shape[0] != pair.b.shape[1]:
            raise ValueError(
                f"{name} {list(pair.a.shape)} and {partner} {list(pair.b.shape)} are not factors "
                "[rank, inputs] and [outputs, rank]"
            )
        pairs.append(pair)
    alone = next((name for name in named if "lora_B" in name), None)
    if alone is not None:
        raise ValueError(f"{alone} trains, and its lora_A does not: train both or neither")
    return pairs, list(named.values())


class PairOptimizer(torch.optim.Optimizer):
    """A torch optimiser over the adapters of a model; subclasses say how pairs move.

    What else trains (norms) goes by AdamW at the rate `others_lr`. State dicts, parameter groups
    and schedulers are torch's.
    """

    def __init__(self, model: nn.Module, others_lr: float, defaults: dict[str, Any]) -> None:
        _check("lr", defaults["lr"])
        _check("others_lr", others_lr)
        _check("weight_decay", defaults["weight_decay"])
        pairs, others = pairs_of(model)
        if not pairs:
            raise ValueError("no adapter trains in this model: lowra.prepare_training(model) first")
        groups: list[dict[str, Any]] = [{"params": [t for p in pairs for t in p], "paired": True}]
        if others:
            groups.append({"params": others, "paired": False, "lr": others_lr})
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["paired"]:
                self._step_pairs(self._with_gradients(group["params"]), group)
                continue
            for p in group["params"]:
                if p.grad is not None:
                    adamw(p, p.grad, self.state[p], group["lr"], group["weight_decay"])
        return loss

    def _with_gradients(self, factors: list[Tensor]) -> list[Pair]:
        pairs = map(Pair, factors[::2], factors[1::2])
        return [p for p in pairs if p.a.grad is not None and p.b.grad is not None]

    @abstractmethod
    def _step_pairs(self, pairs: list[Pair], group: dict[str, Any]) -> None:
        """Move the pairs along their gradients, in place."""


def adamw(p: Tensor, gradient: Tensor, state: dict[str, Any], rate: float, decay: float) -> None:
    """One step of AdamW (arXiv 1711.05101) on one tensor; `state` begins empty."""
    if not state:
        state["step"] = torch.zeros(())
        state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
    state["step"] += 1
    first, second = (1 - beta ** float(state["step"]) for beta in BETAS)
    mean = state["mean"].lerp_(gradient, 1 - BETAS[0])
    square = state["square"].lerp_(gradient.square(), 1 - BETAS[1])
    p.mul_(1 - rate * decay)
    p.addcdiv_(mean, (square / second).sqrt_().add_(EPSILON), value=-rate / first)


def _check(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number of 0 or more")
