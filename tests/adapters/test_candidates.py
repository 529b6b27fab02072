"""Candidates cost what they say, lose what they say, and cover LoRAQuant's split and better."""

from __future__ import annotations

import numpy as np
import pytest

from lowra.adapters.candidates import SINGULAR, SPREAD, Candidate, candidates, pack
from lowra.adapters.factors import LowRank, balanced, relative_error
from lowra.adapters.loraquant import LoRAQuant
from tests.adapters.adapters import lengthened, low_rank

SPECTRA = pytest.mark.parametrize("decay", [0.6, 0.85, 1.0])


def measured(factors: LowRank, candidate: Candidate, group: int = -1) -> tuple[int, float]:
    """Bits, and the squared error of scaling * B A, of the packed site."""
    site = pack(factors, candidate, group)
    found = balanced(factors)
    error = relative_error(found, site.b.dequantize(), site.a.dequantize())
    energy = float(found.sigma.double().square().sum())
    return site.stored_bits(), factors.scaling**2 * energy * error


@SPECTRA
@pytest.mark.parametrize("group", [-1, 64])
@pytest.mark.parametrize("rank", [1, 6, 16])
def test_bits_are_exact_and_losses_are_what_packing_loses(decay, group, rank) -> None:
    factors = low_rank(256, 384, rank, decay)
    found = candidates(factors, group)
    for candidate in [*found[:: len(found) // 6], *(c for c in found if c.basis == SPREAD)]:
        bits, loss = measured(factors, candidate, group)
        assert bits == candidate.bits
        assert loss == pytest.approx(candidate.loss, rel=0.05)


@SPECTRA
def test_every_direction_keeps_at_least_one_bit(decay: float) -> None:
    found = candidates(low_rank(decay=decay), -1)
    assert all(width >= 1 for c in found for pair in c.pairs for width in pair)
    assert found[0].pairs == ((1, 1),) * 8
    assert found[0].bits == 8 * (96 + 160 + 2 * 16)


@SPECTRA
def test_the_singular_candidates_lie_on_a_convex_hull(decay: float) -> None:
    found = [c for c in candidates(low_rank(256, 256, 16, decay), -1) if c.basis == SINGULAR]
    bits, loss = [c.bits for c in found], [c.loss for c in found]
    assert bits == sorted(set(bits)) and loss == sorted(set(loss), reverse=True)
    # steps are ordered by mean shares, from which single vectors differ a little
    for place in range(8, len(found) - 8):
        chord = np.interp(bits[place], bits[place - 8 :: 16][:2], loss[place - 8 :: 16][:2])
        assert loss[place] <= 1.03 * chord


@SPECTRA
@pytest.mark.parametrize(("bits", "rho"), [(2, 0.8), (2, 0.9), (3, 0.8), (3, 0.9), (4, 0.9)])
def test_the_best_candidate_beats_loraquant_at_its_own_bits(decay, bits, rho) -> None:
    """With LoRAQuant's vectors made as long as ours are."""
    factors = low_rank(512, 384, 16, decay)
    site = LoRAQuant(bits, rho).quantize(factors)
    lost = relative_error(balanced(factors), *lengthened(factors, site))
    fitting = [c for c in candidates(factors, -1) if c.bits <= site.stored_bits()]
    best = min(fitting, key=lambda c: c.loss)
    ours = measured(factors, best)[1] / factors.scaling**2
    assert ours < 0.9 * lost * float(balanced(factors).sigma.square().sum())


@SPECTRA
def test_spread_candidates_are_below_the_singular_hull(decay: float) -> None:
    found = candidates(low_rank(512, 512, 16, decay), -1)
    hull = [c for c in found if c.basis == SINGULAR]
    for candidate in (c for c in found if c.basis == SPREAD):
        limit = np.interp(candidate.bits, [c.bits for c in hull], [c.loss for c in hull])
        assert candidate.loss < limit


def test_at_one_bit_for_all_a_steep_spectrum_is_better_spread() -> None:
    found = candidates(low_rank(512, 512, 16, 0.7), -1)
    best = min((c for c in found if c.bits == found[0].bits), key=lambda c: c.loss)
    assert best.basis == SPREAD and best.pairs == ((1, 1),) * 16


def test_the_longer_factor_is_given_fewer_bits() -> None:
    """B [64, r] costs a sixteenth of A [r, 1024]: its bits are the cheaper ones."""
    found = candidates(low_rank(64, 1024, 8, 0.9), -1)
    middle = found[len(found) // 3]
    a, b = (sum(pair[side] for pair in middle.pairs) for side in (0, 1))
    assert b > a
