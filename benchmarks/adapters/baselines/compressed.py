"""What a baseline gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

GROUP = 128
"""Values per scale, as LoRAQuant's baselines have it."""

HALF = 16


@dataclass(frozen=True)
class Compressed:
    """factors: by site, (A [r, k], B [n, r]) as the codes stand for them. bits: of all of them."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    bits: float
