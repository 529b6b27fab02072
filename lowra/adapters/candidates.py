"""What a site could be stored as, from the fewest bits to the most: by direction, and by basis.

A direction may take other bits in A than in B: its error is that of both vectors, and each is paid
for by its length. LoRAQuant's split, 1 bit below the cut and b above, is among these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lowra.adapters.factors import Directions, LowRank, balanced, relative_error, spread
from lowra.adapters.symmetric import Fitting
from lowra.compiler.grids import SYMMETRIC, WIDTHS, Coded
from lowra.compiler.packed_adapter import PackedFactor, PackedSite, Segment, pack_factor

SINGULAR = "singular"
SPREAD = "spread"

Pair = tuple[float, float]
"""Widths of one direction in A and in B."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One way to store a site.

    bits: exact. loss: the expected |scaling (B A - B^ A^)|_F^2. basis: "singular", where directions
    have pairs of widths of their own, or "spread" (`factors.spread`), where all have one pair.
    pairs: widths of each direction, in order; never 0 bits: an allocation that may drop directions
    by their Frobenius error ruins adapters (adapters.md, 1.8).
    """

    bits: int
    loss: float
    basis: str
    pairs: tuple[Pair, ...]


def candidates(factors: LowRank, group: int, found: Directions | None = None) -> list[Candidate]:
    """The candidates of a site, fewest bits first within a basis. `found`: balanced(factors).

    Of the singular basis every point of the lower convex hull of (bits, loss), where the loss of a
    pair is that of its two vectors, e_a + e_b + e_a e_b for codes without bias, times sigma^2. Of
    the spread basis those whose measured loss stays below that hull: there uniform bits lose about
    (sum sigma)^2 / r instead of sum sigma^2, which wins where the spectrum is flat.
    """
    found = balanced(factors) if found is None else found
    table = _Table(found, group)
    singular = [
        Candidate(bits, loss * factors.scaling**2, SINGULAR, pairs)
        for bits, loss, pairs in table.hull()
    ]
    return [*singular, *_spread(factors, found, table, singular)]


def pack(
    factors: LowRank, candidate: Candidate, group: int, found: Directions | None = None
) -> PackedSite:
    """The site as `candidate` says; the rest as it was given to `candidates`."""
    found = balanced(factors) if found is None else found
    if candidate.basis == SPREAD:
        found = spread(found)
    parts: list[PackedFactor] = []
    for side, rows in enumerate((found.a, found.b)):
        parts.append(pack_factor(list(_coded(rows, [p[side] for p in candidate.pairs], group))))
    return PackedSite(factors.name, parts[0], parts[1], factors.scaling, factors.rank)


def _coded(rows: Tensor, widths: Sequence[float], group: int) -> Iterator[Coded]:
    start = 0
    for width, run in groupby(widths):
        stop = start + len(list(run))
        yield Fitting(rows[start:stop], group).coded(width)
        start = stop


class _Table:
    """Errors of every vector at every width, and the pairs of widths that are worth their bits."""

    def __init__(self, found: Directions, group: int) -> None:
        self.group = group
        self.energy: Floats = found.sigma.double().square().numpy()
        self._shares = [self._relative(Fitting(x, group), x) for x in (found.a, found.b)]
        self.bits = [_vector_bits(x.shape[1], group) for x in (found.a, found.b)]
        self.pairs = self._worthwhile()

    @staticmethod
    def _relative(fitting: Fitting, rows: Tensor) -> Floats:
        """[r, widths]: squared error by the vector's squared length, 0 for a vector of zeros."""
        length = rows.double().square().sum(dim=1).numpy()
        lost = np.stack([fitting.losses(width).double().numpy() for width in WIDTHS], axis=1)
        return np.divide(lost, length[:, None], out=np.zeros_like(lost), where=length[:, None] > 0)

    def price(self, pair: Pair) -> int:
        """Bits of one direction."""
        return sum(bits[WIDTHS.index(w)] for bits, w in zip(self.bits, pair, strict=True))

    def shares(self, pair: Pair) -> Floats:
        """[r]: the part of each direction's energy that is lost."""
        a, b = (s[:, WIDTHS.index(w)] for s, w in zip(self._shares, pair, strict=True))
        return a + b + a * b

    def mean(self, pair: Pair) -> float:
        """The shares' mean, weighted by energy; what all directions of a site are judged by."""
        total = self.energy.sum()
        weights = self.energy / total if total else np.full_like(self.energy, 1 / self.energy.size)
        return float(self.shares(pair) @ weights)

    def _worthwhile(self) -> list[Pair]:
        """The lower convex hull of all pairs over their bits, fewest bits first."""
        points = [(self.price(p), self.mean(p), p) for p in product(WIDTHS, WIDTHS)]
        hull: list[tuple[int, float, Pair]] = []
        for point in sorted(points):
            if hull and point[1] >= hull[-1][1]:
                continue
            while len(hull) > 1 and _slope(hull[-2], point) >= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        return [pair for _, _, pair in hull]

    def hull(self) -> Iterator[tuple[int, float, tuple[Pair, ...]]]:
        """(bits, loss, pairs) of a site at every price of a bit.

        The step of direction i to the j-th pair saves energy_i * (fall of the mean share) for its
        bits. In order of saving per bit, every prefix of these steps is the best for its bits.
        """
        prices = [self.price(pair) for pair in self.pairs]
        saved = -np.diff([self.mean(pair) for pair in self.pairs]) / np.diff(prices)
        steps = [
            (-energy * slope, j, i)
            for i, energy in enumerate(self.energy.tolist())
            for j, slope in enumerate(saved.tolist(), start=1)
        ]
        losses = np.stack([self.shares(pair) * self.energy for pair in self.pairs])
        place = [0] * self.energy.size
        yield self._point(place, prices, losses)
        for _, j, i in sorted(steps):
            place[i] = j
            yield self._point(place, prices, losses)

    def _point(
        self, place: list[int], prices: list[int], losses: Floats
    ) -> tuple[int, float, tuple[Pair, ...]]:
        loss = float(losses[place, np.arange(len(place))].sum())
        return sum(prices[j] for j in place), loss, tuple(self.pairs[j] for j in place)


def _spread(
    factors: LowRank, found: Directions, table: _Table, singular: list[Candidate]
) -> Iterator[Candidate]:
    """Candidates of the spread basis that are below the hull of the singular one."""
    hull_bits = [candidate.bits for candidate in singular]
    hull_loss = [candidate.loss for candidate in singular]
    whole = factors.scaling**2 * float(table.energy.sum())
    promise = factors.scaling**2 * float(found.sigma.double().sum()) ** 2 / found.rank
    coder: _SpreadCoder | None = None
    for pair in table.pairs if found.rank > 1 else []:
        bits = found.rank * table.price(pair)
        beat = float(np.interp(bits, hull_bits, hull_loss))
        if promise * table.mean(pair) >= beat:
            continue
        coder = coder or _SpreadCoder(found, table.group)
        loss = whole * relative_error(found, coder.values(1, pair[1]), coder.values(0, pair[0]))
        if loss < beat:
            yield Candidate(bits, loss, SPREAD, (pair,) * found.rank)


class _SpreadCoder:
    """The factors of the spread basis as they are at a width; each made once."""

    def __init__(self, found: Directions, group: int) -> None:
        mixed = spread(found)
        self._fittings = [Fitting(rows, group) for rows in (mixed.a, mixed.b)]
        self._made: dict[tuple[int, float], Tensor] = {}

    def values(self, side: int, width: float) -> Tensor:
        key = (side, width)
        if key not in self._made:
            self._made[key] = self._fittings[side].coded(width).values()
        return self._made[key]


def _vector_bits(length: int, group: int) -> list[int]:
    """Stored bits of one vector at each width."""
    sizes = [Segment(1, width, SYMMETRIC).sizes(length, group) for width in WIDTHS]
    return [32 * size["codes"] + 16 * size["scales"] for size in sizes]


def _slope(low: tuple[int, float, Pair], high: tuple[int, float, Pair]) -> float:
    """Loss saved per bit, as a positive number."""
    return (low[1] - high[1]) / (high[0] - low[0])
