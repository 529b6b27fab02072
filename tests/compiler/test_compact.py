"""Compact scales and codebooks: stable under a second rounding, close, and checked when read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.compiler.compact import (
    Compact,
    decode_scales,
    round_levels,
    round_scales,
    span_of,
)
from lowra.compiler.errors import CheckpointError
from lowra.compiler.packing import unpack_nibbles
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import from_tensors
from tests.compiler.packed_weights import Case, packed_with_dense

FAST = settings(max_examples=60, deadline=None, derandomize=True)


def drawn_scales(n: int, groups: int, seed: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.exp(torch.randn(n, groups, generator=generator) * spread) * 0.01
    scales[torch.rand(n, groups, generator=generator) < 0.1] = 0
    return scales


@FAST
@given(
    st.integers(1, 40), st.integers(1, 9), st.sampled_from([4, 8]), st.booleans(),
    st.integers(0, 999), st.sampled_from([0.0, 1e-4, 0.3, 2.0]),
)  # fmt: skip
def test_rounding_what_is_stored_changes_nothing(
    n: int, groups: int, bits: int, per_row: bool, seed: int, spread: float
) -> None:
    scales = drawn_scales(n, 1 if per_row else groups, seed, spread)
    span = span_of(scales) if per_row else None
    once = round_scales(scales, Compact(bits), span)
    assert torch.equal(round_scales(once, Compact(bits), span), once)
    assert bool((once[scales == 0] == 0).all())
    tables = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    tables[:, 9:] = torch.inf
    levels = round_levels(tables, Compact(16, 8))
    assert torch.equal(round_levels(levels, Compact(16, 8)), levels)
    assert bool((levels[:, 9:] == torch.inf).all()) and bool(torch.isfinite(levels[:, :9]).all())


def test_errors_are_at_most_half_a_step() -> None:
    scales = drawn_scales(300, 8, 3, 0.5)
    for bits in (4, 8):
        near = round_scales(scales, Compact(bits), None)
        step = scales.amax(1, keepdim=True) / ((1 << bits) - 1)
        assert bool(((near - scales).abs() <= 0.502 * step + 1e-3 * scales).all())
        column = scales[:, :1]
        span = span_of(column)
        ratio = float(span[1] / span[0]) ** (0.5 / ((1 << bits) - 2)) * 1.001
        row = round_scales(column, Compact(bits), span)
        live = column > 0
        assert bool((row[live] / column[live] <= ratio).all())
        assert bool((column[live] / row[live] <= ratio).all())


COMPACT = Case((2, 4, 1, 9, 8, 3, 4), 70, 32, compact=Compact(4, 8))
ROWS = dataclasses.replace(COMPACT, group=-1, compact=Compact(8, 8))
Stored = dict[str, Tensor]
DAMAGE: dict[str, tuple[Case, Callable[[Stored], object]]] = {
    "codes without their reach": (COMPACT, lambda s: s.pop("scale_reach")),
    "levels without their tops": (COMPACT, lambda s: s.pop("codebook_tops")),
    "a top too few": (COMPACT, lambda s: s.update(codebook_tops=s["codebook_tops"][1:])),
    "a level too few": (COMPACT, lambda s: s.update(codebooks=s["codebooks"][1:])),
    "levels as bytes": (COMPACT, lambda s: s.update(codebooks=s["codebooks"].view(torch.uint8))),
    "a scale too few": (COMPACT, lambda s: s.update(scales=s["scales"][1:])),
    "scales of 16 bits with a reach": (COMPACT, lambda s: s.update(scales=s["scales"].half())),
    "a top of NaN": (COMPACT, lambda s: s["scale_reach"].fill_(float("nan"))),
    "a negative top": (COMPACT, lambda s: s["codebook_tops"].fill_(-1)),
    "an infinite top": (COMPACT, lambda s: s["codebook_tops"].fill_(float("inf"))),
    "a grid from zero": (ROWS, lambda s: s["scale_reach"][:1].fill_(0)),
    "a grid upside down": (ROWS, lambda s: s.update(scale_reach=s["scale_reach"].flip(0))),
    "a grid of three values": (
        ROWS, lambda s: s.update(scale_reach=s["scale_reach"][[0, 1, 1]])
    ),
    "a reach in another type": (
        ROWS, lambda s: s.update(scale_reach=s["scale_reach"].float())
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tables_are_refused(what: str) -> None:
    case, damage = DAMAGE[what]
    packed, _ = packed_with_dense(case)
    stored = {role: tensor.clone() for role, tensor in packed.tensors().items()}
    damage(stored)
    with pytest.raises(CheckpointError, match=r"\[7, 70\]"):
        from_tensors(stored, packed.n, packed.k, packed.group, Rotation())


def test_a_negative_scale_is_refused_with_the_way_out() -> None:
    with pytest.raises(CheckpointError, match="compile with scale_bits=16"):
        round_scales(torch.tensor([[-1.0]]), Compact(8), None)


def test_the_examples_of_the_storage_format() -> None:
    reach = torch.tensor([0.25, 4.0]).half()
    row = torch.tensor([[0], [1], [128], [255]], dtype=torch.uint8)
    assert decode_scales(row, 8, reach, True).flatten().tolist() == [0, 0.25, 1, 4]
    codes = unpack_nibbles(torch.tensor([0x5F], dtype=torch.uint8), 2).view(1, 2)
    assert decode_scales(codes, 4, torch.tensor([3.0]).half(), False).tolist() == [[3, 1]]
