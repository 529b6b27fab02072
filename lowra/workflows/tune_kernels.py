"""Measure which choice of blocks is the fastest on this GPU, and keep that for later products."""

from __future__ import annotations

import datetime
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lowra.backends.triton import linear, service
from lowra.backends.triton.keys import Blocks
from lowra.backends.triton.schedule import (
    UNPACKED,
    Choice,
    choose,
    parts_of,
    processors,
    tiles_of,
)
from lowra.backends.triton.targets import Target
from lowra.backends.triton.tuning import (
    MOST_RANK,
    add_to_table,
    case_of,
    device_name,
    entry_of,
)
from lowra.backends.triton.weight import Weight, weight_of
from lowra.compiler.errors import LowraError
from lowra.compiler.progress import stage
from lowra.compiler.storage import PackedWeight
from lowra.workflows.gpu_timing import Run, device_copies, seconds_of

log = logging.getLogger("lowra")
FEW = tuple(
    (Blocks(rows, 16, warps, stages), programs)
    for (rows, warps), stages, programs in itertools.product(
        ((64, 4), (128, 4)), (2, 3, 4), (1, 2, 3, 4, 5, 6, 8)
    )
)
"""Up to 16 tokens: blocks, and programs per processor that columns are shared for."""
MANY = (
    *(Blocks(rows, 32, 4, stages) for rows in (64, 128) for stages in (2, 3)),
    *(Blocks(64, 64, 4, 3), Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(256, 64, 8, 2)),
    *(Blocks(128, 128, 8, 2), Blocks(128, 128, 8, 3), Blocks(256, 128, 8, 2)),
)


@dataclass(frozen=True)
class Tuned:
    """The fastest choice of a case, and what was tried; `usual` is what the rules choose."""

    case: str
    choice: Choice
    microseconds: float
    usual: Choice
    usual_microseconds: float
    tried: int
    failed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return asdict(self) | {"choice": entry_of(self.choice), "usual": entry_of(self.usual)}


Measure = Callable[[dict[str, tuple[Run, int]]], dict[str, float]]


def tune(
    weights: Iterable[PackedWeight], tokens: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tuned]:
    """Measure every choice for each weight and number of tokens on the CUDA device, and keep the
    fastest in the user's table, each as soon as it is there. Raises LowraError without a device
    that kernels run on."""
    name = require_device()
    target = service.target_of(torch.device("cuda", torch.cuda.current_device()))
    assert target is not None
    with torch.no_grad():
        for weight in weights:
            copies = device_copies(weight)
            for m in tokens:
                tuned = tune_case(copies, m, dtype, target, seconds_of)
                keep(name, tuned)
                yield tuned


def require_device() -> str:
    """The name of the CUDA device. Raises LowraError without one that kernels run on."""
    if not torch.cuda.is_available():
        raise LowraError("there is no CUDA device: tuning measures kernels on one")
    device = torch.device("cuda", torch.cuda.current_device())
    if service.target_of(device) is None:
        raise LowraError(f"no kernel runs on {device_name(device)}; the warning above says why")
    return device_name(device)


def keep(device: str, tuned: Tuned) -> None:
    """Put the choice into the user's table of this device. Raises LowraError for a damaged one."""
    entry = entry_of(tuned.choice) | {
        "us": round(tuned.microseconds, 2), "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    try:
        add_to_table(device, {tuned.case: entry})
    except ValueError as error:
        raise LowraError(f"the table of {device} is damaged ({error}): delete it") from error


def tune_case(
    copies: list[tuple[Any, ...]], m: int, dtype: torch.dtype, target: Target, measure: Measure
) -> Tuned:
    """The fastest choice for m tokens and weights that are alike. A choice that has no room on the
    device, or none beside factors of rank 64, is no candidate."""
    weight, device = weight_of(copies[0]), copies[0][0].device
    x = torch.randn(m, weight.k, device=device).to(dtype)
    choices = candidates(weight, m, dtype, processors(device), target)
    usual = choices[0]
    seconds: dict[Choice, float] = {}
    with stage(f"tune {weight.n} x {weight.k}, {m} tokens", len(choices)) as bar:
        for choice in choices:
            if choice == usual or _fits(x, copies[0], target, choice):
                run = run_of(x, copies, target, choice)
                seconds[choice] = measure({"it": (run, len(copies))})["it"]
            bar.advance()
    best = min(seconds, key=lambda choice: seconds[choice])
    case = case_of(weight.key.text, weight.n, weight.k, dtype, m)
    return Tuned(case, best, 1e6 * seconds[best], usual, 1e6 * seconds[usual], len(seconds),
                 len(choices) - len(seconds))  # fmt: skip


def candidates(
    weight: Weight, m: int, dtype: torch.dtype, processors: int, target: Target
) -> list[Choice]:
    """Different choices, the usual one first."""
    found = [choose(weight.key, weight.panels, weight.k, m, dtype, processors, target)]
    for blocks, programs in FEW if m <= 16 else ():
        tiles, token_tiles = tiles_of(weight.panels, m, blocks)
        parts = parts_of(tiles * token_tiles, weight.k, blocks, processors, programs)
        found.append(Choice(blocks, parts))
    if m > 16:
        found += [*map(Choice, MANY), UNPACKED]
    return list(dict.fromkeys(found))


def _fits(x: Tensor, packed: tuple[Any, ...], target: Target, choice: Choice) -> bool:
    weight = weight_of(packed)
    a, b = x.new_zeros(MOST_RANK, weight.k), x.new_zeros(weight.n, MOST_RANK)
    try:
        linear.product(x, packed, weight, target, None, (a, b, 1.0), choice)
    except Exception as error:
        log.debug("%s is no candidate: %s", choice, error)
        return False
    return True


def run_of(x: Tensor, copies: list[tuple[Any, ...]], target: Target, choice: Choice) -> Run:
    """Products of x with each of the weights in turn, as `choice` says."""
    made = [(packed, weight_of(packed)) for packed in copies]

    def run(turn: int) -> object:
        packed, weight = made[turn % len(made)]
        return linear.product(x, packed, weight, target, None, None, choice)

    return run
