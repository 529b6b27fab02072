"""Random packed weights, each with its dense value computed on another way in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import lowra.backends.reference  # noqa: F401 - the ops get their meaning
from lowra.compiler.packing import WIDTHS
from lowra.compiler.rotation import Rotation, signs
from lowra.compiler.storage import PackedWeight, pack_weight, scale_groups


@dataclass(frozen=True)
class Case:
    """What to pack: one width per row, a group as in storage, a rotation block."""

    row_widths: tuple[int, ...]
    k: int
    group: int = 0
    shared: bool = False
    block: int = 1
    seed: int = 0

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


def packed_with_dense(case: Case) -> tuple[PackedWeight, Tensor]:
    """The packed weight and W float64 [n, k] in original input coordinates."""
    generator = torch.Generator().manual_seed(case.seed)
    n, k = case.n, case.k
    groups = scale_groups(k, case.group)
    scales = (torch.rand(n, groups, generator=generator) + 0.5).half() if groups else None
    tables = {
        width: torch.randn(1 if case.shared else n, 1 << width, generator=generator).half()
        for width in WIDTHS
    }
    wide = torch.zeros(n, 1 << max(case.row_widths)).half()
    codes = torch.zeros(n, k, dtype=torch.int64)
    dense = torch.zeros(n, k, dtype=torch.float64)
    for row, width in enumerate(case.row_widths):
        codes[row] = torch.randint(0, 1 << width, (k,), generator=generator)
        table = tables[width][0 if case.shared else row]
        wide[row, : 1 << width] = table
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
        {width: table[0] for width, table in tables.items()} if case.shared else wide,
        scales,
        case.group,
        Rotation(case.seed, case.block),
    )
    return packed, dense


@st.composite
def cases(draw: st.DrawFn, most_columns: int = 300) -> Case:
    """Mixed widths, odd sizes, every kind of codebook and scale."""
    k = draw(st.integers(1, most_columns))
    block = draw(st.sampled_from([1, k & -k]))
    return Case(
        row_widths=tuple(draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=7))),
        k=k,
        group=draw(st.sampled_from([0, -1, 1, 32, 50])),
        shared=draw(st.booleans()),
        block=block,
        seed=draw(st.integers(0, 99)),
    )
