"""Trellis codes: each by its definition, and back from its stored bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.compiler.trellis import MEMORY, RUN, codes_in_window, codes_of, stored_of, window


def drawn(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), generator=generator)


def code_by_definition(stored: list[int], row: int) -> int:
    def bit(back: int) -> int:
        return stored[row - back] & 1 if row % RUN >= back else 0

    low, high = bit(2) ^ bit(4), bit(0) ^ bit(1) ^ bit(6)
    return 4 * (stored[row] >> 1) + 2 * high + low


def test_worked_out_by_hand() -> None:
    """Only row 0 stores a lowest bit of 1: it shows in the rows 1, 2, 4 and 6 behind it, too."""
    stored = torch.tensor([[3], [0], [0], [2], [0], [0], [0], [0]])
    assert codes_of(stored).flatten().tolist() == [6, 2, 1, 4, 1, 0, 2, 0]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 3), st.integers(0, 99))
def test_codes_are_those_of_the_definition_and_lead_back(rows: int, bits: int, seed: int) -> None:
    stored = drawn(rows, 3, bits, seed)
    codes = codes_of(stored)
    for column in range(3):
        bits_of = stored[:, column].tolist()
        wanted = [code_by_definition(bits_of, row) for row in range(rows)]
        assert codes[:, column].tolist() == wanted
    assert torch.equal(stored_of(codes), stored)


def test_runs_do_not_depend_on_each_other() -> None:
    stored = drawn(2 * RUN + 9, 5, 2)
    parts = [codes_of(part) for part in stored.split(RUN)]
    assert torch.equal(codes_of(stored), torch.cat(parts))


def test_every_step_has_half_the_levels_to_choose_from() -> None:
    """From any past, the stored bits of a row name different levels, of two subsets."""
    past = drawn(RUN - 1, 50, 2)
    choices = [codes_of(torch.cat((past, torch.full((1, 50), bits))))[-1] for bits in range(4)]
    assert all(len({*column.tolist()}) == 4 for column in torch.stack(choices).T)
    assert all(len({c % 4 for c in column.tolist()}) == 2 for column in torch.stack(choices).T)


def test_codes_off_the_paths_are_refused() -> None:
    codes = codes_of(drawn(70, 4, 2))
    codes[66, 2] ^= 1
    with pytest.raises(ValueError, match="leave the trellis"):
        stored_of(codes)


def test_some_rows_are_read_with_those_before_them() -> None:
    stored = drawn(150, 7, 3)
    rows = torch.tensor([0, 149, 64, 3, 64, 70])
    behind = window(rows)
    assert behind.shape == (MEMORY + 1, 6) and behind[1, 2] == -1 and behind[6, 5] == 64
    read = torch.where((behind < 0).unsqueeze(2), 0, stored[behind.clamp_min(0)])
    assert torch.equal(codes_in_window(read), codes_of(stored)[rows])
