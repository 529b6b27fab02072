"""The sites of an adapter as they are packed: each by itself, or under one budget for them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lowra.adapters.candidates import Candidate, candidates, pack
from lowra.adapters.factors import Directions, LowRank, balanced, energy, relative_error
from lowra.adapters.loraquant import LoRAQuant, check_group
from lowra.compiler.errors import BudgetError
from lowra.compiler.packed_adapter import PackedSite
from lowra.compiler.progress import stage
from lowra.compiler.storage import ROW_SCALES


@dataclass(frozen=True)
class Budget:
    """At most `bits` stored bits per parameter, over the whole adapter; scales, words and all.

    group: columns per scale, -1 for one scale per vector, which is what earns its bits: entries of
    singular vectors are of one size.
    """

    bits: float = 2.0
    group: int = ROW_SCALES

    def __post_init__(self) -> None:
        _budget(self.bits, 1)
        check_group(self.group)

    def __str__(self) -> str:
        return f"budget {self.bits:g}" + (
            "" if self.group == ROW_SCALES else f" group {self.group}"
        )


@dataclass(frozen=True)
class Quantized:
    """A packed site, the part of |B A|_F^2 that it loses, and |scaling B A|_F^2."""

    site: PackedSite
    error: float
    energy: float


def quantize_sites(
    adapters: Sequence[LowRank], method: Budget | LoRAQuant, title: str = "compress adapter"
) -> list[Quantized]:
    """Every site packed, in order. Raises BudgetError before anything is packed."""
    done: list[Quantized] = []
    if isinstance(method, LoRAQuant):
        with stage(title, len(adapters)) as shown:
            for factors in adapters:
                found = balanced(factors)
                done.append(_judged(method.quantize(factors, found), found))
                shown.advance()
        return done
    with stage(title, 2 * len(adapters)) as shown:
        options: list[list[Candidate]] = []
        bases: list[Directions] = []
        for factors in adapters:
            bases.append(balanced(factors))
            options.append(candidates(factors, method.group, bases[-1]))
            shown.advance()
        chosen = choose(options, sum(f.parameters for f in adapters), method.bits)
        for factors, candidate, found in zip(adapters, chosen, bases, strict=True):
            done.append(_judged(pack(factors, candidate, method.group, found), found))
            shown.advance()
    return done


def _judged(site: PackedSite, found: Directions) -> Quantized:
    error = relative_error(found, site.b.dequantize(), site.a.dequantize())
    return Quantized(site, error, site.scaling**2 * energy(found))


def choose(
    options: Sequence[Sequence[Candidate]], parameters: int, bit_budget: float
) -> list[Candidate]:
    """One candidate per site: least total loss with at most `bit_budget` stored bits a parameter.

    The same multiple-choice knapsack as the base's (`solver.solve_knapsack`), sites for rows. The
    cap holds for the adapter as a whole: floor(bit_budget * parameters) bits. Raises BudgetError
    where the fewest bits of all sites are above it.
    """
    from lowra.passes.budget.solver import solve_knapsack

    kept = [_undominated(offers) for offers in options]
    low, high = (sum(pick(c.bits for c in offers) for offers in kept) for pick in (min, max))
    budget = _budget(bit_budget, parameters)
    if budget < low:
        raise BudgetError(
            f"{bit_budget:g} bits per adapter parameter cannot be met: the reachable interval is "
            f"[{math.ceil(1000 * low / parameters) / 1000:g}, {high / parameters:.3g}]; no "
            "direction goes below 1 bit"
        )
    widest = max(len(offers) for offers in kept)
    cost = np.full((len(kept), widest), np.inf)
    bits = np.zeros((len(kept), widest), dtype=np.int64)
    for row, offers in enumerate(kept):
        cost[row, : len(offers)] = [c.loss for c in offers]
        bits[row, : len(offers)] = [c.bits for c in offers]
    plan = solve_knapsack(cost, bits, budget)
    return [kept[row][option] for row, option in enumerate(plan.choice.tolist())]


def _budget(bit_budget: float, parameters: int) -> int:
    if type(bit_budget) not in (int, float):
        raise BudgetError(f"a bit budget of {bit_budget!r} is no number; give bits, as 2.0")
    if not math.isfinite(bit_budget) or bit_budget <= 0:
        raise BudgetError(f"a bit budget of {bit_budget} is not above 0; give bits, as 2.0")
    return math.floor(Fraction(str(float(bit_budget))) * parameters)


def _undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without those that another one beats in loss at no more bits."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.bits, c.loss)):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return kept
