"""How much of a product one program computes, and when W is unpacked instead: as one H200 measured
at a few shapes (docs/decisions/0017), and taken for every GPU where nothing was tuned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowra.backends.triton.keys import Blocks, WeightKey
from lowra.backends.triton.shared_memory import fitting
from lowra.backends.triton.targets import Target
from lowra.compiler.packing import FORMATS

PROGRAMS_PER_PROCESSOR, OF_TRELLIS, INTEGER_PROGRAMS = 5, 3, 2
"""Of products of a few tokens: with trellis codes, which take more shared memory; in integers."""
INTERPRETED_PROCESSORS = 2
MOST_FUSED, MOST_FUSED_TRELLIS = 256, 128
FEW_TOKENS, MANY_TOKENS = 16, 64
"""Up to few, kernels of our own make h = x A' and start early; above many, a fused product with few
programs is slower than unpacking."""
SHORTEST_PART = 2
"""Tiles of 256 columns that a part of a sum has at least."""
INTEGER_PART = 2048
"""Columns of such a part in integers: 64 words of one bit."""
MUCH_SHARED = 160 << 10
MOST_SHRUNK_RANK, MOST_FUSED_RANK = 64, 128
"""Of A up to the first, few tokens meet a kernel of our own, above torch's; factors of a rank above
the second have no room behind a product of many tokens: torch adds them."""


@dataclass(frozen=True)
class Choice:
    """How a product runs: what one program computes, and among how many programs the columns of a
    tile are shared. blocks None: W is unpacked whole, and torch multiplies."""

    blocks: Blocks | None
    parts: int = 1


UNPACKED = Choice(None)


def choose(
    weight: WeightKey, panels: tuple[int, ...], k: int, m: int, dtype: torch.dtype,
    processors: int, target: Target,
) -> Choice:  # fmt: skip
    """How m tokens meet a weight on a device of `processors`."""
    if unpacks(weight, panels, m, dtype, processors, target):
        return UNPACKED
    return fused(weight, panels, k, m, dtype, processors, target)


def fused(
    weight: WeightKey, panels: tuple[int, ...], k: int, m: int, dtype: torch.dtype,
    processors: int, target: Target,
) -> Choice:  # fmt: skip
    """The same, by a kernel that reads W packed."""
    blocks = blocks_of(weight, panels, m, dtype, target)
    tiles, token_tiles = tiles_of(panels, m, blocks)
    each = OF_TRELLIS if has_trellis(panels) else PROGRAMS_PER_PROCESSOR
    return Choice(blocks, parts_of(tiles * token_tiles, k, blocks, processors, each))


def has_trellis(panels: tuple[int, ...]) -> bool:
    return any(FORMATS[id].trellis for id in panels[0::2])


def blocks_of(
    weight: WeightKey, panels: tuple[int, ...], m: int, dtype: torch.dtype, target: Target
) -> Blocks:
    """The usual blocks, or as much of them as has room in shared memory with factors of any rank
    that is fused."""
    usual = linear_blocks(m, target)
    return fitting(weight, dtype.itemsize, usual, MOST_FUSED_RANK, target)


def tiles_of(panels: tuple[int, ...], m: int, blocks: Blocks) -> tuple[int, int]:
    """Tiles of rows, of which each lies in one panel, and tiles of tokens."""
    return sum(-(-rows // blocks.rows) for rows in panels[1::2]), -(-m // blocks.tokens)


def linear_blocks(m: int, target: Target) -> Blocks:
    """Few tokens: 64 rows, which were faster than the fewest instructions per weight (128 rows).
    Many: each value looked up meets as many."""
    stages = 2 if target.backend == "hip" else 3
    if m <= 32:
        return Blocks(64, 16 if m <= 16 else 32, 4, stages)
    if m <= 64 or target.shared_bytes < MUCH_SHARED or not target.backend:
        return Blocks(64, 64, 4, 1 if target.backend == "hip" else stages)
    return Blocks(128, 128, 8, stages)


def unpacks(
    weight: WeightKey, panels: tuple[int, ...], m: int, dtype: torch.dtype, processors: int,
    target: Target,
) -> bool:  # fmt: skip
    """Whether to unpack W and let torch multiply: above some tokens its products are faster, by
    more than unpacking takes; earlier where few rows leave most processors idle, or where every
    tile of tokens looks trellis codes up anew. Between 64, 256 and 1024 tokens nothing was
    measured."""
    if target.backend != "cuda":
        return False
    tiles, token_tiles = tiles_of(panels, m, blocks_of(weight, panels, m, dtype, target))
    few = m > MANY_TOKENS and 3 * tiles <= processors and 2 * tiles * token_tiles <= processors
    return few or m > (MOST_FUSED_TRELLIS if has_trellis(panels) else MOST_FUSED)


def integer_choice(panels: tuple[int, ...], k: int, m: int, fine: bool, processors: int) -> Choice:
    """Of a product of a few tokens in integers: few rows to a program, and as many words in flight
    as registers hold beside all sums."""
    at_once = 1 if fine and has_trellis(panels) else 2 if fine else 4
    blocks = Blocks(16, 1 << (m - 1).bit_length(), 4, at_once if m == 1 else 1)
    tiles, _ = tiles_of(panels, m, blocks)
    wanted = -(-processors * INTEGER_PROGRAMS // max(1, tiles))
    return Choice(blocks, max(1, min(wanted, k // INTEGER_PART)))


def values_blocks() -> Blocks:
    return Blocks(32, 0, 4, 1)


def parts_of(
    programs: int, k: int, blocks: Blocks, processors: int, each: int = PROGRAMS_PER_PROCESSOR
) -> int:
    """Among how many programs the columns of a tile are shared, so that every processor has `each`
    programs and none has no columns; 1 above 16 tokens, where there are enough or sums would be
    too large."""
    if blocks.tokens > 16:
        return 1
    wanted, tiles = -(-processors * each // max(1, programs)), k // 256
    share = max(SHORTEST_PART, tiles // wanted)
    return max(1, -(-tiles // share))


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
