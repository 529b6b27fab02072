"""Products have room in shared memory on every target, whatever is multiplied."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from lowra.backends.triton.keys import Blocks, LinearKey, WeightKey, weight_key
from lowra.backends.triton.schedule import MOST_FUSED_RANK, blocks_of, linear_blocks
from lowra.backends.triton.shared_memory import shared_bytes
from lowra.backends.triton.static import compile_for
from lowra.backends.triton.targets import TARGETS, Target, cuda_target

BY_NAME = {target.name: target for target in (
    *TARGETS, *filter(None, (cuda_target(8, 6), cuda_target(8, 9), cuda_target(12, 0))),
)}  # fmt: skip
PLAIN = ((1,), (2,), (3,), (4,), (8,), (9,), (2, 1), (4, 9, 2, 1))
WIDTHS = (*PLAIN, (11,), (12,), (13,), (13, 12, 11))
TOKENS = (1, 9, 17, 33, 65)
"""Numbers of tokens with different blocks."""


def weight(widths: tuple[int, ...], n: int, group: int = -1) -> tuple[WeightKey, tuple[int, ...]]:
    panels = [number for width in widths for number in (width, n)]
    return weight_key(panels, 8192, group, False, len(widths) > 1), tuple(panels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("target", BY_NAME.values(), ids=BY_NAME)
def test_every_product_has_room_in_shared_memory(target: Target, dtype: torch.dtype) -> None:
    for widths, m, n, group in itertools.product(WIDTHS, TOKENS, (256, 28672), (-1, 40, 64)):
        key, panels = weight(widths, n, group)
        blocks = blocks_of(key, panels, m, dtype, target)
        for rank in (0, 16, MOST_FUSED_RANK):
            size = shared_bytes(key, dtype.itemsize, blocks, rank, target)
            assert size <= target.shared_bytes, (widths, m, n, group, rank, blocks)
        assert blocks.rows >= 16 * blocks.warps


def test_blocks_that_were_measured_stay() -> None:
    """On an H200, in bfloat16; ternary rows of 65 tokens and more had no room in them."""
    for widths, m in itertools.product([w for w in PLAIN if 9 not in w], TOKENS):
        key, panels = weight(widths, 8192)
        usual = linear_blocks(m, BY_NAME["sm90"])
        assert blocks_of(key, panels, m, torch.bfloat16, BY_NAME["sm90"]) == usual


QUICK = [
    ("sm80", "bfloat16", (2, 1), 65), ("sm90", "bfloat16", (9,), 65),
    ("sm80", "bfloat16", (11,), 65), ("sm90", "bfloat16", (13, 12, 11), 65),
]  # fmt: skip
SLOW = [
    ("sm80", "float32", (2,), 65), ("sm86", "float32", (1,), 1), ("sm86", "float32", (1,), 33),
    ("sm100", "bfloat16", (4,), 65), ("sm100", "bfloat16", (9, 1), 65),
    ("gfx942", "bfloat16", (2, 1), 9), ("gfx942", "float32", (1,), 1),
    ("sm80", "float16", (4,), 65), ("sm100", "bfloat16", (12,), 65), ("sm86", "float32", (11,), 1),
    ("gfx942", "bfloat16", (13,), 9),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "dtype", "widths", "m"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_what_is_reckoned_is_no_less_than_what_triton_allocates(
    target: str, dtype: str, widths: tuple[int, ...], m: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("triton", reason="Triton is not installed: lowra[triton]")
    monkeypatch.setenv("LOWRA_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    on, kind = BY_NAME[target], getattr(torch, dtype)
    key, panels = weight(widths, 8192)
    blocks = blocks_of(key, panels, m, kind, on)
    took = compile_for(LinearKey(on, key, dtype, blocks, MOST_FUSED_RANK)).shared_bytes
    assert took <= shared_bytes(key, kind.itemsize, blocks, MOST_FUSED_RANK, on) <= on.shared_bytes


def test_the_largest_blocks_have_no_room_everywhere() -> None:
    """What Triton 3.9 asks for, of blocks of 128 rows and 128 tokens with three stages."""
    key, _ = weight((2, 1), 8192)
    assert shared_bytes(key, 2, Blocks(128, 128, 8, 3), 0, BY_NAME["sm80"]) == 147_456
    key, _ = weight((2,), 8192)
    assert shared_bytes(key, 4, Blocks(128, 128, 8, 3), 0, BY_NAME["sm90"]) == 327_680
    assert shared_bytes(key, 2, Blocks(128, 128, 8, 3), 512, BY_NAME["sm90"]) == 262_144
