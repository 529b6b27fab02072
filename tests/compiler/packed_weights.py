"""Random packed weights, each with its dense value computed on another way in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import lowra.backends.reference  # noqa: F401 - the ops get their meaning
from lowra.compiler import trellis
from lowra.compiler.compact import (
    CODEBOOK_BITS,
    PLAIN,
    SCALE_BITS,
    Compact,
    round_levels,
    round_scales,
    span_of,
)
from lowra.compiler.packing import FORMATS, levels_of, width_id, width_of
from lowra.compiler.rotation import Rotation, signs
from lowra.compiler.storage import PackedWeight, pack_weight, scale_groups


@dataclass(frozen=True)
class Case:
    """What to pack: one width id per row, a group as in storage, a rotation block."""

    row_widths: tuple[int, ...]
    k: int
    group: int = 0
    shared: bool = False
    block: int = 1
    seed: int = 0
    compact: Compact = PLAIN

    @property
    def n(self) -> int:
        return len(self.row_widths)


def hadamard(block: int, k: int, seed: int) -> Tensor:
    """R = H D [k, k] in float64, each entry of H from the parity of i & j."""
    r = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        start = i - i % block
        for j in range(start, start + block):
            r[i, j] = (-1.0) ** ((i - start) & (j - start)).bit_count() / block**0.5
    return r * signs(seed, k)


def random_codes(row_widths: Sequence[int], k: int, generator: torch.Generator) -> Tensor:
    """Codes int64 [n, k] that rows of these ids can store."""
    codes = torch.zeros(len(row_widths), k, dtype=torch.int64)
    for row, id in enumerate(row_widths):
        codes[row] = torch.randint(0, levels_of(id), (k,), generator=generator)
    ids = torch.tensor(row_widths)
    for id, format_ in FORMATS.items():
        if format_.trellis:
            codes[ids == id] = trellis.codes_of(codes[ids == id] >> 1)
    return codes


def packed_with_dense(case: Case) -> tuple[PackedWeight, Tensor]:
    """The packed weight and W float64 [n, k] in original input coordinates."""
    generator = torch.Generator().manual_seed(case.seed)
    n, k = case.n, case.k
    groups = scale_groups(k, case.group)
    scales = (torch.rand(n, groups, generator=generator) + 0.5).half() if groups else None
    span = None
    if scales is not None:
        span = span_of(scales) if case.group < 0 and case.compact.scale_bits < 16 else None
        scales = round_scales(scales, case.compact, span)
    tables = {
        id: torch.randn(1 if case.shared else n, levels_of(id), generator=generator).half()
        for id in FORMATS
    }
    tables = {id: round_levels(table, case.compact) for id, table in tables.items()}
    wide = torch.zeros(n, max(map(levels_of, case.row_widths))).float()
    codes = random_codes(case.row_widths, k, generator)
    dense = torch.zeros(n, k, dtype=torch.float64)
    for row, id in enumerate(case.row_widths):
        table = tables[id][0 if case.shared else row]
        wide[row, : len(table)] = table
        for column in range(k):
            factor = 1.0
            if scales is not None:
                factor = float(scales[row, column // (k if case.group < 0 else case.group)])
            dense[row, column] = float(table[codes[row, column]]) * factor
    if case.block > 1:
        dense = dense @ hadamard(case.block, k, case.seed)
    packed = pack_weight(
        codes,
        torch.tensor(case.row_widths, dtype=torch.uint8),
        {width_of(id): tables[id][0] for id in case.row_widths} if case.shared else wide,
        scales,
        case.group,
        Rotation(case.seed, case.block),
        case.compact,
        span,
    )
    return packed, dense


@st.composite
def cases(draw: st.DrawFn, most_columns: int = 300) -> Case:
    """Mixed widths, odd sizes, every kind of codebook and scale."""
    k = draw(st.integers(1, most_columns))
    coded = draw(st.booleans())
    ids = [id for id in FORMATS if id == width_id(width_of(id), coded)]
    block = draw(st.sampled_from([1, k & -k]))
    return Case(
        row_widths=tuple(draw(st.lists(st.sampled_from(ids), min_size=1, max_size=7))),
        k=k,
        group=draw(st.sampled_from([0, -1, 1, 32, 50])),
        shared=draw(st.booleans()),
        block=block,
        seed=draw(st.integers(0, 99)),
        compact=Compact(draw(st.sampled_from(SCALE_BITS)), draw(st.sampled_from(CODEBOOK_BITS))),
    )
