"""Ensembles of adapters: one batch, every adapter on every sequence, and how far they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.runtime.serving.pool import AdapterPool


@dataclass(frozen=True)
class Ensemble:
    """What M adapters say of the same tokens. members: float32 logits [M, b, t, vocabulary]."""

    members: Tensor

    @property
    def logits(self) -> Tensor:
        """The mean of the members' logits [b, t, vocabulary]."""
        return self.members.mean(dim=0)

    @property
    def probabilities(self) -> Tensor:
        """The mean of the members' probabilities, as LoRA ensembles (arXiv 2310.00035) predict."""
        return self.members.softmax(-1).mean(dim=0)

    @property
    def entropy(self) -> Tensor:
        """Of the mean probabilities, in nats [b, t]: all of the uncertainty."""
        return _entropy(self.probabilities)

    @property
    def disagreement(self) -> Tensor:
        """H(mean p) - mean H(p), in nats [b, t]: what of the entropy is due to the members being
        different (the mutual information of the token and the member); 0 where all agree."""
        inner = _entropy(self.members.softmax(-1)).mean(dim=0)
        return (self.entropy - inner).clamp(min=0)


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(dim=-1)


@torch.no_grad()
def ensemble(pool: AdapterPool, adapters: Sequence[str | None], **inputs: Tensor) -> Ensemble:
    """Run a batch under each of `adapters` (names of the pool; None is the base), in one forward.

    `inputs`: keyword arguments of the model's forward, tensors [b, ...]. Raises AdapterError.
    """
    if not adapters:
        raise AdapterError("an ensemble of no adapters: name at least one")
    size = {len(tensor) for tensor in inputs.values()}
    if len(size) != 1:
        raise AdapterError(f"inputs of batches of {sorted(size)}: give tensors of one batch")
    (count,) = size
    repeated: dict[str, Any] = {
        name: tensor.repeat(len(adapters), *[1] * (tensor.dim() - 1))
        for name, tensor in inputs.items()
    }
    with pool.use([name for name in adapters for _ in range(count)]):
        logits: Tensor = pool.model(**repeated).logits
    return Ensemble(logits.float().view(len(adapters), count, *logits.shape[1:]))
