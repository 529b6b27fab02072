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
from lowra.backends.triton.targets import Target
from lowra.backends.triton.weight import NAMES, Weight

MOST_TOKENS, MOST_FINE_TOKENS = 4, 2
"""Above, what belongs to every token would not fit into registers beside each other."""
WIDTHS = frozenset((1, 2, 3, 4, 9))


def takes(weight: WeightKey, k: int, m: int, fine: bool, target: Target) -> bool:
    """Whether products of m tokens have a kernel in integers: not for rows of 8 bits, scales in
    groups, very wide weights, or targets without byte permutes."""
    known = {panel.width for panel in weight.panels} <= WIDTHS and weight.group <= 0
    can = target.permutes or not target.backend
    few = 0 < m <= (MOST_FINE_TOKENS if fine else MOST_TOKENS)
    return known and can and few and 0 < k <= BLOCK * MOST_BLOCKS


@dataclass(frozen=True)
class Levels:
    """x [m, k] as integers; see emit_levels.py.

    words: int32 [m, orders, 1 or 2, line]. steps, sums: float32 [m, blocks].
    """

    words: Tensor
    steps: Tensor
    sums: Tensor


def quantized(x: Tensor, weight: WeightKey, fine: bool, target: Target) -> Levels:
    """x [m, k], contiguous and in stored coordinates, for products with `weight`."""
    (m, k), device = x.shape, x.device
    key, blocks = quantize_key(weight, NAMES[x.dtype], fine, target), -(-k // BLOCK)
    shape = (m, len(key.orders), 2 if fine else 1, line_words(k))
    levels = Levels(
        launch.room("inputs as integers", shape, torch.int32, device),
        *(launch.room("steps of inputs", (m, blocks), torch.float32, device) for _ in range(2)),
    )
    given = {
        "x": x, "level_bytes": levels.words.view(torch.int8), "steps": levels.steps,
        "sums": levels.sums, "k": k, "line": shape[-1],
    }  # fmt: skip
    launch.run(launch.launcher_of(key), (m, blocks, 1), given)
    return levels


def quantize_key(weight: WeightKey, dtype: str, fine: bool, target: Target) -> QuantizeKey:
    return QuantizeKey(target, dtype, orders_of(weight), fine, target.overlaps)


def product(
    x: Tensor, weight: Weight, fine: bool, target: Target, bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None = None, choice: Choice | None = None,
) -> Tensor:  # fmt: skip
    """y [m, n] of x [m, k], contiguous and in stored coordinates; factors are (h, B, scaling) with
    h = x A' [m, r]."""
    m, device = x.shape[0], x.device
    y = launch.room("a product", (m, weight.n), x.dtype, device)
    rank = 0 if factors is None else factors[0].shape[1]
    choice = choice or integer_choice(weight.panels, weight.k, m, fine, processors(device))
    place = ("integer", m, x.dtype, device, target.name, rank, bias is not None, fine, choice)
    plan = weight.form.plans.get(place)
    if plan is None:
        key, grid = product_key(
            weight, m, NAMES[x.dtype], fine, target, rank, bias is not None, choice
        )
        tiles = weight.form.tiles_of(key.blocks.rows, device)
        plan = weight.form.keep(place, (launch.launcher_of(key), grid, tiles))
    launcher, grid, tiles = plan
    levels = quantized(x, weight.key, fine, target)
    given = {
        **weight.tensors(), "level_words": levels.words, "steps": levels.steps,
        "sums": levels.sums, "tiles": tiles, "bias": bias, "y": y, "m": m, "n": weight.n,
        "k": weight.k, "line": levels.words.shape[-1],
    }  # fmt: skip
    if factors is not None:
        given |= {"hidden": factors[0], "lora_b": factors[1], "scaling": factors[2], "rank": rank}
    if grid[2] > 1:
        given |= launch.room_for_sums(
            "product", grid[0] * grid[1], grid[2], launcher.key.blocks, device
        )
    launch.run(launcher, grid, given)
    return y


def product_key(
    weight: Weight, m: int, dtype: str, fine: bool, target: Target, rank: int, bias: bool,
    choice: Choice,
) -> tuple[IntegerKey, tuple[int, int, int]]:  # fmt: skip
    """The kernel of a product of m tokens, and its grid."""
    assert choice.blocks is not None
    key = IntegerKey(
        target, weight.key, dtype, choice.blocks, launch.padded_rank(rank), bias, choice.parts > 1,
        target.overlaps, fine,
    )  # fmt: skip
    return key, (*tiles_of(weight.panels, m, choice.blocks), choice.parts)
