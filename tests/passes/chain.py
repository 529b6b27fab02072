"""A plain model whose last site reads what two siblings make, and data for it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from lowra.compiler.capture import capture
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.program import Program
from lowra.passes import NormalizeLinears


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Chain(nn.Module):
    """Two siblings on one input, then a product of both on the third site."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 48, bias=False), nn.Linear(64, 48)
        self.last = nn.Linear(48, 32)
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=index) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.left(x)) * self.right(x))


X = random(400, 64, seed=9) @ random(64, 64, seed=10) / 8


@functools.cache
def chain() -> tuple[Chain, Program]:
    model = Chain().eval()
    return model, run_pipeline(capture(model, (X[:4],)), (NormalizeLinears(),))
