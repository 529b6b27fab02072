"""Packed adapters: codes, scales and zero points come back bit for bit; bits are counted right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.compiler.errors import AdapterError
from lowra.compiler.grids import ASYMMETRIC, SYMMETRIC, Coded
from lowra.compiler.packed_adapter import (
    PackedAdapter,
    PackedFactor,
    PackedSite,
    Segment,
    pack_factor,
    split_tensors,
)
from lowra.compiler.packing import pack_bits, unpack_bits
from lowra.compiler.storage import scale_groups

LEVELS = {1: 2, 1.6: 3, 2: 4, 3: 8, 4: 16}


def coded(rows: int, length: int, width: float, grid: str, group: int, seed: int = 0) -> Coded:
    generator = torch.Generator().manual_seed(seed)

    def numbers(columns: int) -> torch.Tensor:
        high = LEVELS[width]
        drawn = torch.randint(0, high, (rows, columns), generator=generator)
        return drawn.to(torch.uint8)

    groups = scale_groups(length, group)
    zeros = numbers(groups) if grid == ASYMMETRIC else None
    scales = torch.rand(rows, groups, generator=generator).half()
    return Coded(numbers(length), scales, zeros, width, group)


PARTS = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 5), st.sampled_from([1, 1.6, 2, 3, 4]), st.just(SYMMETRIC)),
        st.tuples(st.integers(1, 5), st.sampled_from([2, 3, 4]), st.just(ASYMMETRIC)),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(PARTS, st.integers(1, 400), st.sampled_from([-1, 1, 16, 100, 128]))
def test_packing_round_trips_bit_for_bit(parts, length: int, group: int) -> None:
    made = [coded(*part[:1], length, *part[1:], group, seed) for seed, part in enumerate(parts)]
    factor = pack_factor(made)
    back = factor.coded()
    for name in ("codes", "scales"):
        before = torch.cat([getattr(part, name) for part in made])
        assert torch.equal(before, torch.cat([getattr(part, name) for part in back]))
    kept = [z.reshape(-1) for part in made if (z := part.zeros) is not None]
    found = [z.reshape(-1) for part in back if (z := part.zeros) is not None]
    assert len(kept) == 0 or torch.equal(torch.cat(kept), torch.cat(found))
    assert torch.equal(factor.dequantize(), torch.cat([part.values() for part in made]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=50), st.integers(1, 8))
def test_bits_round_trip_and_take_no_more_than_they_must(values: list[int], bits: int) -> None:
    given_ = torch.tensor([v % (1 << bits) for v in values], dtype=torch.uint8)
    packed = pack_bits(given_, bits)
    assert packed.numel() == -(-len(values) * bits // 8)
    assert torch.equal(unpack_bits(packed, len(values), bits), given_)


def test_zero_points_lie_as_the_format_says() -> None:
    # 3-bit values 1, 6, 3: bits 100 011 110 from the lowest on
    assert pack_bits(torch.tensor([1, 6, 3], dtype=torch.uint8), 3).tolist() == [0b11110001, 0]


def test_equal_neighbours_are_one_segment() -> None:
    parts = [coded(2, 64, 2, SYMMETRIC, -1), coded(3, 64, 2, SYMMETRIC, -1, 1)]
    assert pack_factor(parts).segments == (Segment(5, 2, SYMMETRIC),)
    assert pack_factor([*parts, coded(1, 64, 1, SYMMETRIC, -1)]).text() == "5x2,1x1"


def site(name: str = "up") -> PackedSite:
    a = pack_factor([coded(2, 160, 3, ASYMMETRIC, 64), coded(3, 160, 1, SYMMETRIC, 64)])
    b = pack_factor([coded(5, 96, 2, SYMMETRIC, 64)])
    return PackedSite(name, a, b, 2.0, 6)


def test_stored_bits_are_the_bytes_of_the_tensors() -> None:
    adapter = PackedAdapter((site("a"), site("b")))
    tensors = adapter.tensors()
    assert set(tensors) == {"codes", "scales", "zeros"}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert adapter.stored_bits() == 8 * size
    # A: 2 rows of 160 x 3 bits, 3 of 160 x 1; 5 rows of 3 scales; 6 zero points of 3 bits, 18 = 3
    # bytes. B: 5 rows of 96 x 2 bits and 2 scales
    assert site().stored_bits() == 2 * 480 + 3 * 160 + 15 * 16 + 24 + 5 * 192 + 10 * 16


def test_flat_tensors_come_apart_into_views_of_the_same_factors() -> None:
    adapter = PackedAdapter((site("a"), site("b")))
    factors = [f for s in adapter.sites for f in (s.a, s.b)]
    tensors = adapter.tensors()
    again = split_tensors(tensors, [(f.length, f.group, f.segments) for f in factors])
    for before, after in zip(factors, again, strict=True):
        assert torch.equal(before.dequantize(), after.dequantize())
        start = after.codes.data_ptr() - tensors["codes"].data_ptr()
        assert 0 <= start < 4 * tensors["codes"].numel()
    with pytest.raises(AdapterError, match="codes are"):
        split_tensors(tensors, [(f.length, f.group, f.segments) for f in factors[:-1]])
    with pytest.raises(AdapterError, match="codes are"):
        split_tensors(tensors, [(f.length + 64, f.group, f.segments) for f in factors])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_flat_tensors_with_a_wrong_scale_are_refused(value: float) -> None:
    adapter = PackedAdapter((site("a"),))
    tensors = adapter.tensors()
    tensors["scales"] = tensors["scales"].clone()
    tensors["scales"][-1] = value
    shapes = [(f.length, f.group, f.segments) for f in (adapter.sites[0].a, adapter.sites[0].b)]
    with pytest.raises(AdapterError, match="a scale is negative or not finite"):
        split_tensors(tensors, shapes)
    with pytest.raises(AdapterError, match="codes are torch.int64"):
        split_tensors({**tensors, "codes": tensors["codes"].long()}, shapes)


def test_a_packed_factor_with_wrong_tensors_is_refused() -> None:
    factor = site().a
    fields = {name: getattr(factor, name) for name in ("length", "group", "segments")}
    tensors = {name: getattr(factor, name) for name in ("codes", "scales", "zeros")}
    bad = torch.full_like(factor.scales, float("nan"))
    for name, tensor in (
        ("codes", factor.codes[:-1]), ("codes", factor.codes.long()), ("scales", bad),
        ("scales", -factor.scales), ("zeros", factor.zeros[:0]),
    ):  # fmt: skip
        with pytest.raises(AdapterError):
            PackedFactor(**fields, **(tensors | {name: tensor}))
    with pytest.raises(AdapterError, match="group 0"):
        PackedFactor(**(fields | {"group": 0}), **tensors)


@pytest.mark.parametrize(
    ("rows", "width", "grid"),
    [(0, 2, SYMMETRIC), (1, 5, SYMMETRIC), (1, 1, ASYMMETRIC), (1, 2, "")],
)
def test_a_segment_that_no_grid_has_is_refused(rows: int, width: float, grid: str) -> None:
    with pytest.raises(AdapterError, match="a segment of"):
        Segment(rows, width, grid)


def test_factors_of_other_ranks_are_refused() -> None:
    with pytest.raises(AdapterError, match="5 and 4 directions"):
        PackedSite("up", site().a, pack_factor([coded(4, 96, 2, SYMMETRIC, 64)]), 1.0, 8)


def test_directions_that_were_not_stored_are_zero() -> None:
    a, b = site().dense()
    assert a.shape == (6, 160) and b.shape == (96, 6)
    assert not a[5].any() and not b[:, 5].any() and np.isfinite(a.numpy()).all()
