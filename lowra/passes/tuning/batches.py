"""What the tuning passes share: blocks, batches of which some are held out, changed tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowra.compiler.blocks import Block, find_blocks
from lowra.compiler.capture import fingerprint_of
from lowra.compiler.errors import CalibrationError, CaptureError
from lowra.compiler.facts import Adapter, Packed
from lowra.compiler.program import Program

HELD_OUT = 8
"""One of this many batches is held out."""


def tunable_blocks(program: Program) -> list[Block]:
    """The blocks of a program. Raises CaptureError where there is nothing to tune by."""
    if program.graph is None:
        raise CaptureError(f"tuning needs the traced graph, and there is none: {program.warning}")
    blocks = find_blocks(program)
    if not blocks:
        raise CaptureError(
            "tuning by blocks needs a graph in which one activation joins a layer to the next; "
            "this one has none that holds every site (an encoder-decoder?): use tune='none'"
        )
    return blocks


def split_batches(program: Program, tokens: int) -> list[tuple[Tensor, ...]]:
    """Calibration batches of at most about `tokens` tokens, small enough that one of `HELD_OUT`
    can be held out. Raises CalibrationError where there is nothing to hold out."""
    if not program.calibration:
        raise CalibrationError("tuning needs calibration data: give some, or use tune='none'")
    windows = sum(batch[0].shape[0] for batch in program.calibration)
    found: list[tuple[Tensor, ...]] = []
    for batch in program.calibration:
        rows = min(tokens // _tokens_per_row(batch[0]), windows // HELD_OUT)
        parts = [tensor.split(max(1, rows)) for tensor in batch]
        found += zip(*parts, strict=True)
    if len(found) < 2:
        raise CalibrationError(
            f"tuning holds out a part of the calibration data, and {list(found[0][0].shape)} is "
            "one window: give more, or use tune='none'"
        )
    return found


def _tokens_per_row(first: Tensor) -> int:
    shape = first.shape[1:-1] if first.is_floating_point() else first.shape[1:]
    return max(1, shape.numel())


def held_out(count: int) -> int:
    """How many of `count` batches are held out: the last ones."""
    return max(1, count // HELD_OUT)


def data_fingerprint(program: Program, batches: Sequence[tuple[Tensor, ...]]) -> str:
    """Of the batches, and of everything that earlier passes have put in the model's place."""
    tensors = {f"batch.{i}.{j}": t for i, b in enumerate(batches) for j, t in enumerate(b)}
    tensors |= {f"replaced.{name}": program.tensors[name].detach() for name in program.replaced}
    for site in program.sites:
        weight = program.fact(site.name, Packed).weight
        tensors |= {f"{site.name}.{role}": t for role, t in weight.tensors().items()}
        if adapter := program.find(site.name, Adapter):
            tensors |= {f"{site.name}.A": adapter.lora_a, f"{site.name}.B": adapter.lora_b}
    return fingerprint_of(tensors)


def shuffled(count: int, steps: int, seed: int) -> list[int]:
    """Which of `count` batches each step takes: all of them in a new order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator).tolist()
    return found[:steps]


def with_tensors(program: Program, changed: Mapping[str, Tensor]) -> Program:
    """The program with other tensors in place of some of its own."""
    fresh = {name: nn.Parameter(t, requires_grad=False) for name, t in changed.items()}
    before = {name: program.tensors[name] for name in fresh}
    return replace(
        program, tensors={**program.tensors, **fresh}, replaced={**before, **program.replaced}
    )
