"""Launching products of a few tokens in integers, where the user allows them (activations.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.backends.reference.integers import BLOCK
from lowra.backends.triton import launch
from lowra.backends.triton.emit_integer import MOST_BLOCKS
from lowra.backends.triton.emit_levels import line_words, orders_of
from lowra.backends.triton.keys import IntegerKey, QuantizeKey, WeightKey
from lowra.backends.triton.schedule import Choice, integer_choice, processors, tiles_of
from lowra.backends.triton.service import refuse_failed
from lowra.backends.triton.targets import Target
from lowra.backends.triton.weight import NAMES, Weight

MOST_TOKENS = 2
"""At 4, products in bfloat16 were as fast or faster but at 4 bits (an H200); 2 and 3 were not
measured."""
WIDTHS = frozenset((1, 2, 3, 4, 9, 11, 12, 13))


def takes(weight: WeightKey, k: int, m: int, target: Target) -> bool:
    """Whether products of m tokens have a kernel in integers: not for rows of 8 bits, scales in
    groups, very wide weights, or targets without byte permutes."""
    known = {panel.width for panel in weight.panels} <= WIDTHS and weight.group <= 0
    can = target.permutes or not target.backend
    return known and can and 0 < m <= MOST_TOKENS and 0 < k <= BLOCK * MOST_BLOCKS


@dataclass(frozen=True)
class Levels:
    """x [m, k] as integers; see emit_levels.py.

    words: int32 [m, orders, 1 or 2, line]. steps, sums: float32 [m, blocks].
    """

    words: Tensor
    steps: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Plan:
    """What a product of `m` tokens launches: what makes the levels, then what multiplies."""

    quantize: launch.Launcher
    multiply: launch.Launcher
    grid: tuple[int, int, int]
    tiles: Tensor


def planned(
    weight: Weight, m: int, dtype: torch.dtype, fine: bool, target: Target, rank: int,
    factor_dtype: str, bias: bool, device: torch.device,
) -> Plan:  # fmt: skip
    """The plan of a product, before anything is launched. Raises KernelError where one of its
    kernels failed before."""
    place = ("integer", m, dtype, fine, target.name, rank, factor_dtype, bias, device)
    plan: Plan | None = weight.form.plans.get(place)
    if plan is None:
        choice = integer_choice(weight.panels, weight.k, m, fine, processors(device))
        key, grid = product_key(
            weight, m, NAMES[dtype], fine, target, rank, bias, choice, factor_dtype
        )
        quantize = quantize_key(weight.key, NAMES[dtype], fine, target)
        tiles = weight.form.tiles_of(key.blocks.rows, device)
        launchers = launch.launcher_of(quantize), launch.launcher_of(key)
        plan = weight.form.keep(place, Plan(*launchers, grid, tiles))
    for launcher in (plan.quantize, plan.multiply):
        refuse_failed(launcher.name)
    return plan


def product_key(
    weight: Weight, m: int, dtype: str, fine: bool, target: Target, rank: int, bias: bool,
    choice: Choice, factor_dtype: str = "",
) -> tuple[IntegerKey, tuple[int, int, int]]:  # fmt: skip
    """The kernel of a product of m tokens, and its grid."""
    assert choice.blocks is not None
    key = IntegerKey(
        target, weight.key, dtype, choice.blocks, launch.padded_rank(rank), bias, choice.parts > 1,
        target.overlaps, factor_dtype, fine,
    )  # fmt: skip
    return key, (*tiles_of(weight.panels, m, choice.blocks), choice.parts)


def quantize_key(weight: WeightKey, dtype: str, fine: bool, target: Target) -> QuantizeKey:
    return QuantizeKey(target, dtype, orders_of(weight), fine, target.overlaps)


def product(
    x: Tensor, weight: Weight, plan: Plan, bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """y [m, n] of x [m, k], contiguous and in stored coordinates; factors are (h, B, scaling) with
    h = x A' [m, r]."""
    m, device = x.shape[0], x.device
    y = launch.room("a product", (m, weight.n), x.dtype, device)
    if y.numel() == 0:
        return y
    levels = quantized(x, plan.quantize)
    given = {
        **weight.tensors(), "level_words": levels.words, "steps": levels.steps,
        "sums": levels.sums, "tiles": plan.tiles, "bias": bias, "y": y, "m": m, "n": weight.n,
        "k": weight.k, "line": levels.words.shape[-1],
    }  # fmt: skip
    if factors is not None:
        h, b, scaling = factors
        given |= {"hidden": h, "lora_b": b, "scaling": scaling, "rank": h.shape[1]}
    if plan.grid[2] > 1:
        tiles, token_tiles, parts = plan.grid
        given |= launch.room_for_sums(
            "product", tiles * token_tiles, parts, plan.multiply.key.blocks, device
        )
    launch.run(plan.multiply, plan.grid, given)
    return y


def quantized(x: Tensor, launcher: launch.Launcher) -> Levels:
    """x [m, k], contiguous and in stored coordinates, by the kernel of a `QuantizeKey`."""
    (m, k), key = x.shape, launcher.key
    assert isinstance(key, QuantizeKey)
    shape = (m, len(key.orders), 2 if key.fine else 1, line_words(k))
    blocks = -(-k // BLOCK)
    levels = Levels(
        launch.room("inputs as integers", shape, torch.int32, x.device),
        *(launch.room("steps of inputs", (m, blocks), torch.float32, x.device) for _ in range(2)),
    )
    given = {
        "x": x, "level_bytes": levels.words.view(torch.int8), "steps": levels.steps,
        "sums": levels.sums, "k": k, "line": shape[-1],
    }  # fmt: skip
    launch.run(launcher, (m, blocks, 1), given)
    return levels
