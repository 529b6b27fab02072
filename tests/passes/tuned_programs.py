"""Tiny models, quantized and ready to be tuned; and twice the same data for all."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.facts import Adapter, Packed
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.spill import Spill
from lowra.passes import (
    AssignPrecision,
    CollectStatistics,
    FitCodebooks,
    QuantizeWeights,
    RotateInputs,
)
from tests import models
from tests.compiler.captured import normalized


def data(name: str, batches: int = 8) -> tuple[tuple[Tensor, ...], ...]:
    model, _ = normalized(name)
    return tuple(tuple(models.tokens(model, 4, 16, seed=i).values()) for i in range(batches))


@functools.cache
def quantized(name: str, budget: float = 3.0, **layout: Any) -> Program:
    """A tiny model with mixed widths, its statistics in a folder that goes with it; `layout` are
    options of fit-codebooks."""
    _, program = normalized(name)
    passes = (
        RotateInputs(), CollectStatistics(), FitCodebooks(widths=(1, 2, 3), **layout),
        AssignPrecision(budget), QuantizeWeights(),
    )  # fmt: skip
    return run_pipeline(replace(program, calibration=data(name), spill=Spill()), passes)


def tuned(program: Program, step: Pass, folder: Path | None = None) -> Program:
    """`program` after one tuning pass that keeps its files in a folder of its own."""
    return run_pipeline(replace(program, spill=Spill(folder)), (step,))


def stored_bytes(program: Program) -> dict[str, Tensor]:
    """Everything that would be stored, by name."""
    made = {name: program.tensors[name].detach() for name in program.replaced}
    for site in program.sites:
        if adapter := program.find(site.name, Adapter):
            made |= {f"{site.name}.A": adapter.lora_a, f"{site.name}.B": adapter.lora_b}
        weight = program.fact(site.name, Packed).weight
        made |= {f"{site.name}.{role}": t for role, t in weight.tensors().items()}
    return made


def same(one: Program, other: Program) -> bool:
    a, b = stored_bytes(one), stored_bytes(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
