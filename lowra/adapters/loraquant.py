"""LoRAQuant as published: singular directions cut in two, RTN above the cut and signs below."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowra.adapters.factors import Directions, LowRank, balanced
from lowra.adapters.group_rtn import clipped, round_to_nearest
from lowra.adapters.optimise import RELEASED, STRAIGHT_THROUGH, Descent, optimised
from lowra.adapters.split import PAPER, SPLIT_RULES, split_rank
from lowra.adapters.symmetric import signed
from lowra.compiler.errors import RecipeError, nearest
from lowra.compiler.grids import ASYMMETRIC_WIDTHS, Coded
from lowra.compiler.packed_adapter import PackedSite, pack_factor
from lowra.compiler.storage import ROW_SCALES

CLIPS: dict[str, Descent | None] = {
    "none": None,
    "search": None,
    "ste": STRAIGHT_THROUGH,
    "released": RELEASED,
}
"""What is done to the high part before it is rounded: nothing, the clip search, the paper's
gradient steps with a straight-through estimator, or those of the authors' code."""


@dataclass(frozen=True)
class LoRAQuant:
    """`bits`@`rho`: the directions that cover rho of sum sigma^2 at `bits`, the others at 1 bit.

    group: columns of A, rows of B per scale, -1 for one scale per direction; a shorter last group
    where it does not divide. split: "paper" or "released" (see `split_rank`). clip: one of `CLIPS`.
    """

    bits: float = 2
    rho: float = 0.8
    group: int = 128
    split: str = PAPER
    clip: str = "search"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in ASYMMETRIC_WIDTHS:
            raise RecipeError(f"bits of the high part are {self.bits!r}; give 2, 3 or 4")
        if not isinstance(self.rho, (int, float)) or not 0 < self.rho <= 1:
            raise RecipeError(f"rho is {self.rho!r}; give a share above 0 and at most 1, as 0.8")
        check_group(self.group)
        for name, value, known in (
            ("split", self.split, SPLIT_RULES),
            ("clip", self.clip, tuple(CLIPS)),
        ):
            if value not in known:
                raise RecipeError(f"{name} is {value!r}; {nearest(str(value), known, 4)}")

    def __str__(self) -> str:
        return f"loraquant {self.bits:g}@{self.rho:g} group {self.group} {self.split} {self.clip}"

    def quantize(self, factors: LowRank, found: Directions | None = None) -> PackedSite:
        """The packed adapter of one linear. `found`: balanced(factors), where it is known."""
        found = balanced(factors) if found is None else found
        high = split_rank(found.sigma, self.rho, self.split)
        parts = self._halves(found, high)
        a, b = (pack_factor(part) for part in parts)
        return PackedSite(factors.name, a, b, factors.scaling, factors.rank)

    def _halves(self, found: Directions, high: int) -> tuple[list[Coded], list[Coded]]:
        b, a = found.b[:high], found.a[:high]
        descent = CLIPS[self.clip]
        if descent is not None:
            b, a = optimised(b, a, int(self.bits), self.group, descent)
        low = [[signed(x[high:], self.group)] if high < len(x) else [] for x in (found.a, found.b)]
        return [self._rounded(a), *low[0]], [self._rounded(b), *low[1]]

    def _rounded(self, rows: Tensor) -> Coded:
        rounding = clipped if self.clip == "search" else round_to_nearest
        return rounding(rows, int(self.bits), self.group)


def check_group(group: int) -> None:
    """Raise RecipeError unless `group` is -1 or a positive number."""
    if isinstance(group, bool) or not isinstance(group, int) or (group < 1 and group != ROW_SCALES):
        raise RecipeError(
            f"group is {group!r}; give columns per scale, as 128, or -1 for one scale per direction"
        )
