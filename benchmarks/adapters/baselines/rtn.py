"""Rounding to nearest, and signs with a scale: LoRAQuant's simplest baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from benchmarks.adapters.baselines.compressed import GROUP, HALF, Compressed
from lowra.adapters.factors import LowRank
from lowra.adapters.group_rtn import round_to_nearest
from lowra.adapters.symmetric import signed
from lowra.compiler.grids import Coded


def rtn(
    adapters: Sequence[LowRank], _grams: Mapping[str, Tensor], bits: int, row_major: bool = False
) -> Compressed:
    """`bits` per value, a scale in 16 bits and a zero point in `bits` per 128 values.

    Groups lie within a row of A and a column of B; `row_major`, as LoRAQuant's code has it for its
    baselines, within a row of A and along B as it lies in memory, across columns.
    """
    factors, total = {}, 0.0
    for one in adapters:
        a = round_to_nearest(one.a, bits, GROUP)
        b = round_to_nearest(one.b.reshape(1, -1) if row_major else one.b.T, bits, GROUP)
        values = b.values()
        factors[one.name] = (a.values(), values.view(one.n, -1) if row_major else values.T)
        total += _bits(a) + _bits(b)
    return Compressed(factors, total)


def binary(adapters: Sequence[LowRank], _grams: Mapping[str, Tensor]) -> Compressed:
    """Sign times the mean size of each 128 values, along rows of A and columns of B."""
    factors, total = {}, 0.0
    for one in adapters:
        a, b = signed(one.a.float(), GROUP), signed(one.b.T.float(), GROUP)
        factors[one.name] = (a.values(), b.values().T)
        total += _bits(a) + _bits(b)
    return Compressed(factors, total)


def _bits(coded: Coded) -> float:
    zeros = 0 if coded.zeros is None else coded.zeros.numel() * coded.width
    return coded.codes.numel() * coded.width + HALF * coded.scales.numel() + zeros
