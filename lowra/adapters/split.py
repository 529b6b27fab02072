"""Where LoRAQuant cuts the directions in two, and what its storage counts to."""

from __future__ import annotations

from torch import Tensor

PAPER = "paper"
RELEASED = "released"
SPLIT_RULES = (PAPER, RELEASED)

SCALE_BITS = 16


def split_rank(sigma: Tensor, rho: float, rule: str = PAPER) -> int:
    """How many directions are stored in high precision: h, at least 1.

    sigma: [r], descending. "paper" (LoRAQuant, arXiv 2510.26690): the smallest h with
    sum of the first h sigma^2 >= rho * sum of all. "released", as the authors' code has it: the
    0-based index of that position, so h - 1 (at least 1), and the coverage stays below rho.
    """
    squares = sigma.double().square()
    total = float(squares.sum())
    if not total:
        return 1
    covered = (squares.cumsum(0) / total).tolist()
    # At rho = 1 rounding may keep the last sum below 1: then all directions are needed.
    place = next((i for i, part in enumerate(covered) if part >= rho), len(covered) - 1)
    return max(place + (1 if rule == PAPER else 0), 1)


def formula_bits(share: float, bits: int, group: int = 128) -> float:
    """Stored bits per parameter of LoRAQuant `bits`@rho, by the paper's count.

    share: f, the part of all directions' parameters that is in high precision.
    f (b + (16 + b) / G) + (1 - f) (1 + 16 / G): per group of G a half-precision scale, and a zero
    point of b bits where the grid is asymmetric. At f = 0.52, b = 2: 1.65, the published figure.
    """
    high = bits + (SCALE_BITS + bits) / group
    return share * high + (1 - share) * (1 + SCALE_BITS / group)
