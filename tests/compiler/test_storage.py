"""A packed weight counts its bits exactly, means what it says, and refuses anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.compiler.errors import CheckpointError
from lowra.compiler.packing import pack_nibbles, panels_of, row_order, unpack_nibbles, width_of
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import PackedWeight, from_tensors, scale_groups
from lowra.compiler.stored_bits import row_bits, site_bits
from tests.compiler.packed_weights import Case, cases, packed_with_dense

FAST = settings(max_examples=40, deadline=None, derandomize=True)
MIXED = Case(row_widths=(2, 4, 1, 2, 8, 3, 4), k=70, group=32)
TERNARY = Case(row_widths=(2, 9, 1, 9, 4), k=576, group=-1, shared=True)


@FAST
@given(cases())
def test_stored_bits_are_eight_times_the_bytes_of_the_tensors(case: Case) -> None:
    packed, _ = packed_with_dense(case)
    stored = packed.tensors()
    assert packed.stored_bits() == 8 * sum(len(t.numpy().tobytes()) for t in stored.values())
    widths = [width_of(id) for id in case.row_widths]
    ids = case.row_widths
    rows = sum(row_bits(case.k, id, case.group, case.shared, case.compact) for id in ids)
    used = tuple(set(ids))
    assert packed.stored_bits() == rows + site_bits(
        case.n, used, case.shared, case.compact, case.group, case.k
    )
    assert packed.code_bits() == pytest.approx(sum(widths) * case.k)


def test_stored_bits_of_one_site_counted_by_hand() -> None:
    """3 rows of 40 columns, padded to 64, of 4 + 2 + 2 bits; tables of 16 + 4 + 4 values."""
    packed, _ = packed_with_dense(Case(row_widths=(2, 4, 2), k=40, group=-1))
    assert packed.stored_bits() == 64 * 8 + 16 * 24 + 16 * 3 + 16
    shared, _ = packed_with_dense(Case(row_widths=(2, 4, 2), k=40, group=-1, shared=True))
    assert shared.stored_bits() == 64 * 8 + 16 * 20 + 16 * 3 + 16
    ternary, _ = packed_with_dense(TERNARY)
    assert ternary.stored_bits() == 576 * 7 + 2 * 29 * 32 + 16 * (16 + 4 + 3 + 2) + 16 * 5 + 24


def test_ternary_rows_stand_between_two_bits_and_one() -> None:
    packed, _ = packed_with_dense(TERNARY)
    assert packed.panels == ((4, 1), (2, 1), (9, 2), (1, 1))
    assert packed.order.tolist() == [4, 0, 1, 3, 2]
    assert packed.rows == {4: 1, 2: 1, 1.6: 2, 1: 1}
    assert packed.code_bits() == pytest.approx(576 * (4 + 2 + 1 + 2 * 1.6))


@FAST
@given(cases())
def test_dequantize_equals_table_times_scale_in_float64(case: Case) -> None:
    packed, dense = packed_with_dense(case)
    torch.testing.assert_close(packed.dequantize(torch.float64), dense, rtol=1e-12, atol=1e-12)
    single = packed.dequantize()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), dense, rtol=1e-5, atol=1e-5)


@FAST
@given(cases(most_columns=80))
def test_stored_tensors_alone_give_the_weight_back(case: Case) -> None:
    packed, _ = packed_with_dense(case)
    stored = {role: tensor.clone() for role, tensor in packed.tensors().items()}
    again = from_tensors(stored, packed.n, packed.k, packed.group, packed.rotation)
    assert torch.equal(again.row_widths, packed.row_widths)
    assert again.panels == packed.panels and again.shared == packed.shared
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_rows_are_stored_widest_first_and_otherwise_in_order() -> None:
    widths = torch.tensor([2, 4, 1, 2, 8, 3, 4], dtype=torch.uint8)
    assert row_order(widths).tolist() == [4, 1, 6, 5, 0, 3, 2]
    assert row_order(widths).dtype == torch.int32
    assert panels_of(widths) == ((8, 1), (4, 2), (3, 1), (2, 2), (1, 1))


def test_a_shared_codebook_is_stored_once_per_panel() -> None:
    packed, _ = packed_with_dense(dataclasses.replace(MIXED, shared=True))
    assert packed.shared and packed.codebooks.numel() == 256 + 16 + 8 + 4 + 2
    own, _ = packed_with_dense(MIXED)
    assert not own.shared and own.codebooks.numel() == 256 + 2 * 16 + 8 + 2 * 4 + 2


@pytest.mark.parametrize(
    ("k", "group", "groups"), [(70, 0, 0), (70, -1, 1), (70, 32, 3), (64, 32, 2), (5, 32, 1)]
)
def test_scales_per_row(k: int, group: int, groups: int) -> None:
    assert scale_groups(k, group) == groups


@FAST
@given(st.lists(st.integers(0, 15), min_size=1, max_size=33))
def test_nibbles_survive_packing(values: list[int]) -> None:
    tensor = torch.tensor(values, dtype=torch.uint8)
    packed = pack_nibbles(tensor)
    assert packed.dtype == torch.uint8 and packed.numel() == (len(values) + 1) // 2
    assert torch.equal(unpack_nibbles(packed, len(values)), tensor)


def test_even_index_is_the_low_nibble() -> None:
    assert pack_nibbles(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x21, 0x03]


Stored = dict[str, Tensor]
DAMAGE: dict[str, Callable[[Stored], object]] = {
    "no codes": lambda s: s.pop("codes"),
    "no codebooks": lambda s: s.pop("codebooks"),
    "no row widths": lambda s: s.pop("row_widths"),
    "no scales": lambda s: s.pop("scales"),
    "one code word too few": lambda s: s.update(codes=s["codes"][:-1]),
    "one code word too many": lambda s: s.update(codes=torch.cat((s["codes"], s["codes"][:1]))),
    "codes of another type": lambda s: s.update(codes=s["codes"].long()),
    "one codebook value too few": lambda s: s.update(codebooks=s["codebooks"][:-1]),
    "codebooks of another type": lambda s: s.update(codebooks=s["codebooks"].float()),
    "one scale too few": lambda s: s.update(scales=s["scales"][:-1]),
    "scales of another type": lambda s: s.update(scales=s["scales"].float()),
    "a byte of widths too few": lambda s: s.update(row_widths=s["row_widths"][:-1]),
    "widths of another type": lambda s: s.update(row_widths=s["row_widths"].int()),
    "a width of 5": lambda s: s.update(row_widths=s["row_widths"] | 5),
    "a width of 0": lambda s: s.update(row_widths=s["row_widths"] & 0xF0),
    "two widths swapped for narrower ones": lambda s: s.update(
        row_widths=pack_nibbles(torch.ones(7, dtype=torch.uint8))
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tensors_are_refused(what: str) -> None:
    packed, _ = packed_with_dense(MIXED)
    stored = packed.tensors()
    DAMAGE[what](stored)
    with pytest.raises(CheckpointError, match=r"\[7, 70\]"):
        from_tensors(stored, packed.n, packed.k, packed.group, packed.rotation)


@pytest.mark.parametrize("group", [0, -1, 50, -2, 16])
def test_a_group_that_does_not_fit_the_scales_is_refused(group: int) -> None:
    packed, _ = packed_with_dense(MIXED)
    if scale_groups(70, group) == scale_groups(70, 32):
        pytest.skip("as many scales")
    with pytest.raises(CheckpointError, match="scales for group"):
        dataclasses.replace(packed, group=group)


@pytest.mark.parametrize("block", [0, -2, 3, 4, 7, 64])
def test_a_rotation_that_does_not_divide_k_is_refused(block: int) -> None:
    packed, _ = packed_with_dense(MIXED)
    with pytest.raises(CheckpointError, match="rotation block"):
        dataclasses.replace(packed, rotation=Rotation(0, block))


@pytest.mark.parametrize(("n", "k"), [(6, 70), (8, 70), (7, 97), (7, 20)])
def test_sizes_that_do_not_fit_the_tensors_are_refused(n: int, k: int) -> None:
    packed, _ = packed_with_dense(MIXED)
    with pytest.raises(CheckpointError):
        from_tensors(packed.tensors(), n, k, packed.group, Rotation())


def test_packing_twice_gives_the_same_bytes() -> None:
    first, second = packed_with_dense(MIXED)[0], packed_with_dense(MIXED)[0]
    for role, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[role])


def test_row_widths_are_what_a_packed_weight_was_given() -> None:
    packed, _ = packed_with_dense(MIXED)
    assert isinstance(packed, PackedWeight)
    assert packed.row_widths.tolist() == list(MIXED.row_widths)
    assert packed.weights == 7 * 70
