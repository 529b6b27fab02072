"""Correction: a frozen low-rank part of a weight, its two factors stored as packed weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowra.compiler.errors import CheckpointError
from lowra.compiler.storage import ROW_SCALES, PackedWeight
from lowra.compiler.stored_bits import row_bits, site_bits

FACTORS = ("correction_A", "correction_B")
"""Names of the factors' tensors, between the module's name and the role."""


@dataclass(frozen=True)
class Correction:
    """C = B A beside a packed base: the layer computes (W^ + C) x.

    `a` packs A [r, k], in a rotation of its own if it has one; `b` packs B' [r, n], transposed so
    that its rows are long: a row of r codes would be mostly padding.
    """

    a: PackedWeight
    b: PackedWeight

    def __post_init__(self) -> None:
        if self.a.n != self.b.n or self.b.rotation.active:
            raise CheckpointError(
                f"a correction of factors [{self.a.n}, {self.a.k}] and [{self.b.n}, {self.b.k}]: "
                "their ranks differ, or the second is rotated"
            )

    @property
    def rank(self) -> int:
        return self.a.n

    def product(self) -> Tensor:
        """float32 [n, k] in original coordinates."""
        return self.b.dequantize().T @ self.a.dequantize()

    def stored_bits(self) -> int:
        return self.a.stored_bits() + self.b.stored_bits()

    def factors(self) -> dict[str, PackedWeight]:
        """The packed factors by name."""
        return dict(zip(FACTORS, (self.a, self.b), strict=True))


def correction_bits(n: int, k: int, rank: int, bits: int) -> int:
    """Exact stored bits of a correction of a weight [n, k]; its rank is at most min(n, k)."""
    rank = min(rank, n, k)
    if rank == 0:
        return 0
    rows = row_bits(k, bits, ROW_SCALES, True) + row_bits(n, bits, ROW_SCALES, True)
    return rank * rows + 2 * site_bits(rank, (bits,), True)
