"""Look-up blocks, executed instruction by instruction: every code of every field, bit for bit."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from lowra.backends.triton.lookups import SAME_LEVELS, TABLE_WORDS, look_up
from lowra.backends.triton.tables import _WORDS
from lowra.backends.triton.trellis_words import TAPS, number_lines, number_words
from lowra.compiler import trellis
from lowra.compiler.packing import FORMATS, levels_of, pack_rows
from tests.backends.ptx import MASK, execute, lop3, prmt


def table_words(width: int, values: list[int]) -> list[int]:
    """Registers of a table of half-precision patterns, by the text that kernels run."""
    names = {f"c{i}": value for i, value in enumerate(values)}
    return [eval(text, {}, dict(names)) for text in _WORDS[SAME_LEVELS.get(width, width)]]


def packed_words(width: int, codes: torch.Tensor) -> list[list[int]]:
    """Words of the planes of one full tile, unsigned."""
    words = [int(w) & 0xFFFFFFFF for w in pack_rows(codes.view(1, -1), width)]
    made, start = [], 0
    for bits in FORMATS[width].planes:
        made.append(words[start : start + 8 * bits])
        start += 8 * bits
    return made


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_field_of_two_words_finds_its_value(width: int, own: bool) -> None:
    generator = random.Random(width)
    block = look_up(width, own)
    size = 8 * FORMATS[width].planes[0]
    for trial in range(20):
        codes = torch.tensor([generator.randrange(levels_of(width)) for _ in range(256)])
        tables = [[generator.randrange(1 << 16) for _ in range(levels_of(width))] for _ in "ab"]
        if not own:
            tables[1] = tables[0]
        planes = packed_words(width, codes)
        v = 2 * (trial % (size // 2))
        words = [planes[0][v], planes[0][v + 1]]
        if width == 3:  # the upper plane beside the lower one, as kernels load it
            words += [planes[1][(v + i) % 8] >> (v + i) // 8 for i in (0, 1)]
        both = [table_words(width, table) for table in tables]
        inputs = [both[e][i] for i in range(TABLE_WORDS[width]) for e in (0, 1)] + words
        outputs = execute(block.text, block.fields, inputs)
        assert block.constraints.count("=&r") == block.fields
        assert block.constraints.count(",r") == len(inputs)
        for field, register in enumerate(outputs):
            column = field * size + v
            want = [tables[e][int(codes[column + e])] for e in (0, 1)]
            assert [register & 0xFFFF, register >> 16] == want, (field, v)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("id", [11, 12, 13])
def test_words_of_a_run_find_the_levels_that_its_stored_bits_name(id: int, own: bool) -> None:
    """The text before a look-up, on whole words, then the look-up: every field of two columns."""
    generator = torch.Generator().manual_seed(id)
    block, levels = look_up(id, own), levels_of(id)
    size = 8 * FORMATS[id].planes[0]
    codes = trellis.codes_of(torch.randint(levels // 2, (9, 256), generator=generator))
    words = pack_rows(codes, id).int()
    planes = []
    for bits in FORMATS[id].planes:
        planes.append(words[: 9 * 8 * bits].view(9, -1))
        words = words[9 * 8 * bits :]
    tables = torch.randint(1 << 16, (2, levels), generator=generator).tolist()
    both = [table_words(id, tables[element if own else 0]) for element in (0, 1)]
    for row, v in itertools.product((0, 3, 8), range(0, size, 2)):
        given = [
            named_words(id, [plane[: row + 1, (v + i) % plane.shape[1]] for plane in planes],
                        (v + i) // 8)
            for i in (0, 1)
        ]  # fmt: skip
        turns = number_words(id)
        for turn, names in enumerate(turns):
            inputs = [both[e][i] for i in range(TABLE_WORDS[id]) for e in (0, 1)]
            inputs += [given[e][name] for name in names for e in (0, 1)]
            outputs = execute(block.text, block.fields, inputs)
            for field, register in enumerate(outputs):
                column = (len(turns) * field + turn) * size + v
                found = [int(codes[row, column + e]) for e in (0, 1)]
                want = [tables[e if own else 0][code] for e, code in enumerate(found)]
                assert [register & 0xFFFF, register >> 16] == want, (row, column)


def named_words(id: int, column: list[torch.Tensor], shift: int) -> dict[str, int]:
    """What `number_lines` leave for the last of a run's rows, of the words of its rows by plane."""
    names = {f"w{tap}": 0 for tap in TAPS}
    names |= {f"w{back or ''}": int(w) & MASK for back, w in enumerate(reversed(column[0]))}
    if len(column) == 2:
        names["h"] = (int(column[1][-1]) & MASK) >> shift
    exec("\n".join(number_lines(id)), {}, names)
    return {name: word & MASK for name, word in names.items()}


@pytest.mark.parametrize("own", [False, True])
def test_every_byte_gives_its_five_ternary_digits(own: bool) -> None:
    block = look_up(9, own)
    generator = random.Random(9)
    tables = [[generator.randrange(1 << 16) for _ in range(3)] for _ in range(4)]
    tables = tables if own else [tables[0]] * 4
    both = [table_words(9, table) for table in tables]
    inputs = [both[e][i] for i in (0, 1) for e in range(4)]
    for start in range(0, 243, 4):
        numbers = [min(start + e, 242) for e in range(4)]
        word = sum(-(-number * 256 // 243) << 8 * e for e, number in enumerate(numbers))
        outputs = execute(block.text, 10, [*inputs, word])
        for digit in range(5):
            for e, number in enumerate(numbers):
                register = outputs[2 * digit + e // 2]
                code = number // 3 ** (4 - digit) % 3
                assert register >> 16 * (e % 2) & 0xFFFF == tables[e][code]


def test_instructions_as_the_manual_has_them() -> None:
    assert prmt(0x33221100, 0x77665544, 0x7531) == 0x77553311
    assert prmt(0x00008000, 0, 0x9988) == 0xFFFF0000  # mode bits replicate a sign
    assert lop3(0b1100, 0b1010, 0b0110, 0x6A) & 15 == (0b1100 & 0b1010) ^ 0b0110
