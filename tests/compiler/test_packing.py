"""Codes survive packing bit for bit, and lie where the storage format says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.compiler.packing import (
    FORMATS,
    levels_of,
    pack_rows,
    padded_columns,
    row_words,
    unpack_rows,
    width_id,
    width_of,
)
from lowra.compiler.trellis import codes_of

IDS = [id for id, format_ in FORMATS.items() if not format_.trellis]
TERNARY = width_id(1.6)


def drawn_codes(rows: int, k: int, id: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels_of(id), (rows, k), generator=generator)


def words_by_definition(row: list[int], bits: int) -> list[int]:
    """The words of one row from the definition alone, as unsigned Python integers."""
    row = row + [0] * (-len(row) % 32)
    words = []
    for k0 in range(0, len(row), 256):
        tile = row[k0 : k0 + 256]
        count = len(tile) * bits // 32
        for v in range(count):
            words.append(sum(tile[f * count + v] << (f * bits) for f in range(32 // bits)))
    return words


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(IDS), st.integers(1, 9), st.integers(1, 700), st.integers(0, 99))
def test_unpacking_gives_back_every_code(width: int, rows: int, k: int, seed: int) -> None:
    codes = drawn_codes(rows, k, width, seed)
    words = pack_rows(codes, width)
    assert words.dtype == torch.int32 and words.dim() == 1
    assert words.numel() == rows * row_words(k, width)
    assert torch.equal(unpack_rows(words, rows, k, width), codes.int())


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("k", [1, 19, 20, 31, 32, 33, 255, 256, 257, 320, 321, 512, 576, 600])
def test_unpacking_gives_back_extreme_codes_at_borders_of_words_and_tiles(id: int, k: int) -> None:
    levels = levels_of(id)
    codes = torch.stack(
        (torch.full((k,), levels - 1), torch.zeros(k).long(), torch.arange(k) % levels)
    )
    assert torch.equal(unpack_rows(pack_rows(codes, id), 3, k, id), codes.int())


def test_word_worked_out_by_hand() -> None:
    """Codes 0 1 2 3 0 1 ..: word 0 takes the even columns 0 2 0 2, word 1 the odd ones 1 3 1 3."""
    words = pack_rows((torch.arange(32) % 4).view(1, 32), 2)
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [0x88888888, 0xDDDDDDDD]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [5, 64, 256, 300, 576])
def test_field_f_of_word_v_holds_column_k0_plus_f_times_words_plus_v(width: int, k: int) -> None:
    codes = drawn_codes(2, k, width)
    expected = [word for row in codes.tolist() for word in words_by_definition(row, width)]
    assert [word & 0xFFFFFFFF for word in pack_rows(codes, width).tolist()] == expected


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    codes = drawn_codes(5, 333, 3)
    planes = torch.cat((pack_rows(codes & 3, 2), pack_rows(codes >> 2, 1)))
    assert torch.equal(pack_rows(codes, 3), planes)


@pytest.mark.parametrize(
    ("k", "columns"), [(1, 32), (32, 32), (33, 64), (256, 256), (576, 576), (577, 608)]
)
def test_a_row_is_padded_to_a_multiple_of_32(k: int, columns: int) -> None:
    assert padded_columns(k) == columns
    whole = (1, 2, 3, 4, 8)
    assert [row_words(k, width) for width in whole] == [columns * w // 32 for w in whole]


@pytest.mark.parametrize(
    ("k", "words"), [(1, 1), (20, 1), (21, 2), (320, 16), (321, 17), (576, 29), (1536, 77)]
)
def test_a_ternary_row_takes_a_word_per_20_columns(k: int, words: int) -> None:
    assert row_words(k, TERNARY) == words
    assert pack_rows(torch.ones(3, k).long(), TERNARY).numel() == 3 * words


def ternary_bytes_by_definition(row: list[int]) -> list[int]:
    """The bytes of one ternary row from the definition alone."""
    data = []
    for k0 in range(0, len(row), 320):
        tile = row[k0 : k0 + 320]
        count = 4 * -(-len(tile) // 20)
        tile = tile + [0] * (5 * count - len(tile))
        for v in range(count):
            number = sum(tile[f * count + v] * 3 ** (4 - f) for f in range(5))
            data.append(-(-number * 256 // 243))
    return data


@pytest.mark.parametrize("k", [1, 20, 33, 320, 576, 1000])
def test_digit_f_of_a_ternary_byte_v_is_column_k0_plus_f_times_bytes_plus_v(k: int) -> None:
    codes = drawn_codes(3, k, TERNARY)
    expected = [byte for row in codes.tolist() for byte in ternary_bytes_by_definition(row)]
    assert [*pack_rows(codes, TERNARY).numpy().astype("<i4").tobytes()] == expected


def test_every_byte_reads_as_five_ternary_digits() -> None:
    """243 bytes stand for their digits; the 13 that no packer writes are still in range."""
    words = torch.arange(256, dtype=torch.uint8).view(torch.int32)
    codes = unpack_rows(words, 64, 20, TERNARY)
    assert codes.min() == 0 and codes.max() == 2
    written = pack_rows(codes, TERNARY)
    assert torch.equal(unpack_rows(written, 64, 20, TERNARY), codes)


def test_ids_name_widths_and_rows_are_ordered_by_width() -> None:
    assert [width_of(id) for id in FORMATS] == [8, 4, 3, 3, 2, 2, 1.6, 1, 1]
    assert [width_id(width_of(id)) for id in IDS] == IDS == [8, 4, 3, 2, 9, 1]
    assert [levels_of(id) for id in IDS] == [256, 16, 8, 4, 3, 2]
    assert [width_id(width_of(id), trellis=True) for id in IDS] == [8, 4, 13, 12, 9, 11]
    assert [levels_of(id) for id in (13, 12, 11)] == [16, 8, 4]


@pytest.mark.parametrize("id", [11, 12, 13])
def test_a_trellis_row_stores_what_a_plain_one_of_its_width_does(id: int) -> None:
    stored = drawn_codes(70, 300, int(width_of(id)))
    words = pack_rows(codes_of(stored), id)
    assert torch.equal(words, pack_rows(stored, int(width_of(id))))
    assert torch.equal(unpack_rows(words, 70, 300, id), codes_of(stored).int())
    assert row_words(300, id) == row_words(300, int(width_of(id)))


def test_padding_is_zero() -> None:
    ones = pack_rows(torch.ones(1, 40, dtype=torch.int64), 1)
    assert sum((word & 0xFFFFFFFF).bit_count() for word in ones.tolist()) == 40


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_codes_of_any_integer_type_pack_alike(dtype: torch.dtype) -> None:
    codes = drawn_codes(3, 70, 8)
    assert torch.equal(pack_rows(codes.to(dtype), 8), pack_rows(codes, 8))
    assert torch.equal(codes, drawn_codes(3, 70, 8)), "packing wrote into its input"


def test_the_ternary_word_of_the_storage_format() -> None:
    words = pack_rows((torch.arange(20) % 3).view(1, 20), TERNARY)
    assert [word & 0xFFFFFFFF for word in words.tolist()] == [0x31BB9431]
