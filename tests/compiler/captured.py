"""Programs of the tiny models, captured once per test run, and a small plain model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

import lowra.backends.reference  # noqa: F401 - the ops get their meaning
from lowra.compiler.capture import capture
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.spill import Spill
from lowra.passes import NormalizeLinears
from tests import models

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": models.tiny_llama,
    "gpt2": models.tiny_gpt2,
    "bert": models.tiny_bert,
    "t5": models.tiny_t5,
    "bart": models.tiny_bart,
    "mixtral": models.tiny_mixtral,
    "mlp": models.plain_mlp,
}


@functools.cache
def captured(name: str) -> tuple[nn.Module, Program]:
    """A tiny model of `tests.models` and its program; neither may be written to."""
    model = MODELS[name]()
    example = None if hasattr(model, "config") else tuple(models.tokens(model).values())
    return model, capture(model, example)


@functools.cache
def normalized(name: str) -> tuple[nn.Module, Program]:
    """The same after `normalize-linears`."""
    model, program = captured(name)
    return model, run_pipeline(program, (NormalizeLinears(),))


def compiled_from(program: Program, passes: Sequence[Pass]) -> Program:
    """`program` through `passes`, its work files in a folder that goes with the result."""
    return run_pipeline(replace(program, spill=Spill()), passes)


def arithmetic(*shape: int) -> Tensor:
    """Small exact fractions that look random: integers mod 13, eighths, none of them special."""
    count = torch.Size(shape).numel()
    index = torch.arange(count, dtype=torch.int64)
    return (((index * index + 5 * index) % 13 - 6).to(torch.float32) / 8).view(shape)


class ThreeProducts(nn.Module):
    """A linear with bias, a bare parameter, a linear without bias; arithmetic weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 24)
        self.mix = nn.Parameter(arithmetic(24, 16))
        self.down = nn.Linear(16, 8, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(arithmetic(*parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)) @ self.mix)


def three_products() -> tuple[ThreeProducts, Program]:
    model = ThreeProducts().eval()
    return model, capture(model, (arithmetic(4, 32),))
