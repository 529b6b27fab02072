"""Shared memory that a product takes, as Triton 3.9 was seen to allocate it; a test compiles some
kernels and compares. Never less than that, so that blocks are chosen which fit."""

from __future__ import annotations

from dataclasses import replace

from lowra.backends.triton.keys import TERNARY_ID, Blocks, WeightKey
from lowra.backends.triton.lookups import TABLE_WORDS
from lowra.backends.triton.targets import Target
from lowra.backends.triton.tiles import (
    TERNARY_FIELD,
    field_words,
    fields_at_once,
    shares_scale,
)
from lowra.backends.triton.trellis_words import TAPS
from lowra.compiler.packing import FORMATS, TERNARY_TILE, TILE

FEWEST_TOKENS, FEWEST_ROWS = 16, 32
BARRIERS = 4608
"""Of a product on sm_100: barriers, and room through which sums leave tensor memory."""


def fitting(
    weight: WeightKey, item_bytes: int, blocks: Blocks, rank: int, target: Target
) -> Blocks:
    """`blocks`, or the next smaller ones whose product has room on the target."""
    while shared_bytes(weight, item_bytes, blocks, rank, target) > target.shared_bytes:
        less = smaller(blocks)
        if less == blocks:
            break
        blocks = less
    return blocks


def smaller(blocks: Blocks) -> Blocks:
    """Fewer loads in flight down to two, then fewer tokens or rows, whichever are more."""
    if blocks.stages > 2:
        return replace(blocks, stages=blocks.stages - 1)
    if blocks.tokens > FEWEST_TOKENS and blocks.tokens >= blocks.rows:
        return replace(blocks, tokens=blocks.tokens // 2)
    if blocks.rows > FEWEST_ROWS:
        rows = blocks.rows // 2
        return replace(blocks, rows=rows, warps=min(blocks.warps, rows // 16))
    return replace(blocks, stages=1)


def shared_bytes(
    weight: WeightKey, item_bytes: int, blocks: Blocks, rank: int, target: Target
) -> int:
    """Of the widest panel's loop, or of the factors behind it, whichever is more."""
    loops = [_loop(weight, panel.width, item_bytes, blocks, target) for panel in weight.panels]
    # Beside few tokens B may be in float32 (`launch.reads_factor`).
    b_bytes = 4 if blocks.tokens <= FEWEST_TOKENS and target.backend != "hip" else item_bytes
    factors = (blocks.rows * b_bytes + blocks.tokens * item_bytes) * rank
    return max([*loops, factors]) + (BARRIERS if _from_tensor_memory(target) else 0)


def _loop(weight: WeightKey, width: int, item_bytes: int, blocks: Blocks, target: Target) -> int:
    """Tokens and words in flight, and values of W on their way to the product."""
    halves, ternary = item_bytes == 2, width == TERNARY_ID
    if ternary:
        tile, block = TERNARY_TILE, TERNARY_FIELD
    else:
        tile, block = TILE, field_words(width) * fields_at_once(weight, width)
    later = blocks.stages - 1
    tokens, values = blocks.tokens * tile * item_bytes, blocks.rows * block * item_bytes
    words = 4 * blocks.rows * _words(width) if halves and target.permutes else 0
    odd = weight.group > 0 and not shares_scale(weight, width)
    scales = 2 * blocks.rows * block * later if odd else 0
    if not later:
        return max(values, blocks.tokens * block * item_bytes)
    if halves and target.multiplies_from_shared:
        # Tokens are read by the product while the next ones arrive; of W, ternary rows alone pass.
        passing = (5 if _from_tensor_memory(target) else 1) * values if ternary else 0
        return blocks.stages * tokens + later * words + passing + scales
    stay = halves and target.permutes and not ternary and not odd
    return later * (tokens + words) + (0 if stay else values) + scales


def _words(width: int) -> int:
    """Of a row's tile, those that are loaded ahead; codes that look up a table in memory wait."""
    if width not in TABLE_WORDS:
        return 0
    planes = FORMATS[width].planes
    earlier = len(TAPS) * planes[0] if FORMATS[width].trellis else 0
    return 8 * (sum(planes) + earlier) or TERNARY_FIELD // 4


def _from_tensor_memory(target: Target) -> bool:
    return target.multiplies_from_shared and target.arch != 90
