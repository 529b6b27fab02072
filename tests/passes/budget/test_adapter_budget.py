"""The budget of an adapter is a hard cap, met by the choice that loses least."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lowra.adapters.candidates import Candidate, candidates
from lowra.adapters.factors import LowRank, balanced, relative_error
from lowra.adapters.loraquant import LoRAQuant
from lowra.compiler.errors import BudgetError, RecipeError
from lowra.compiler.packed_adapter import PackedSite
from lowra.passes.budget.adapter_budget import Budget, choose
from lowra.passes.budget.adapter_budget import quantize_sites as quantized_sites
from tests.adapters.adapters import lengthened, low_rank


def quantize_sites(adapters: list[LowRank], method: Budget | LoRAQuant) -> list[PackedSite]:
    return [done.site for done in quantized_sites(adapters, method)]


def sites() -> list[LowRank]:
    return [
        low_rank(128, 256, 8, 0.7, "a", seed=1),
        low_rank(256, 128, 8, 0.95, "b", seed=2),
        low_rank(64, 128, 4, 0.9, "c", scaling=0.1, seed=3),
    ]


def lost(adapters: list[LowRank], packed) -> float:
    total = 0.0
    for factors, site in zip(adapters, packed, strict=True):
        found = balanced(factors)
        error = relative_error(found, site.b.dequantize(), site.a.dequantize())
        total += factors.scaling**2 * error * float(found.sigma.square().sum())
    return total


@pytest.mark.parametrize("bits", [1.2, 1.5, 1.61, 2.0, 2.5, 3.0, 4.5])
@pytest.mark.parametrize("group", [-1, 64])
def test_the_budget_is_a_hard_cap_and_is_used(bits: float, group: int) -> None:
    adapters = sites()
    packed = quantize_sites(adapters, Budget(bits + (0.3 if group > 0 else 0), group))
    parameters = sum(site.parameters for site in packed)
    stored = sum(site.stored_bits() for site in packed) / parameters
    cap = bits + (0.3 if group > 0 else 0)
    assert stored <= cap
    assert stored > min(cap, 4.0) - 0.06


def test_more_bits_never_lose_more() -> None:
    adapters = sites()
    losses = [lost(adapters, quantize_sites(adapters, Budget(b))) for b in (1.2, 1.6, 2, 2.5, 3, 4)]
    assert all(b < a for a, b in zip(losses, losses[1:], strict=False))


@pytest.mark.parametrize("point", [(2, 0.8), (2, 0.9), (3, 0.8), (3, 0.9)])
def test_at_loraquants_bits_the_budget_loses_less(point: tuple[int, float]) -> None:
    """With LoRAQuant's vectors made as long as ours are."""
    adapters = sites()
    theirs = quantize_sites(adapters, LoRAQuant(*point))
    bits = sum(s.stored_bits() for s in theirs) / sum(s.parameters for s in theirs)
    ours = quantize_sites(adapters, Budget(bits))
    assert sum(s.stored_bits() for s in ours) <= sum(s.stored_bits() for s in theirs)
    longer = [
        factors.scaling**2
        * relative_error(balanced(factors), *lengthened(factors, site))
        * float(balanced(factors).sigma.square().sum())
        for factors, site in zip(adapters, theirs, strict=True)
    ]
    assert lost(adapters, ours) < 0.9 * sum(longer)


def test_the_choice_is_the_best_of_all_choices() -> None:
    points = (
        [(10, 9.0), (20, 4.0), (30, 3.5)],
        [(10, 5.0), (15, 3.0), (40, 0.0)],
        [(5, 1.0), (9, 0.9)],
    )
    options = [[Candidate(bits, loss, "singular", ()) for bits, loss in row] for row in points]
    for budget in range(25, 80):
        every = [
            (sum(c.loss for c in pick), sum(c.bits for c in pick))
            for pick in product(*options)
            if sum(c.bits for c in pick) <= budget
        ]
        chosen = choose(options, 1, budget)
        assert sum(c.loss for c in chosen) == pytest.approx(min(every)[0])
        assert sum(c.bits for c in chosen) <= budget


def test_a_site_with_little_to_say_gets_fewer_bits() -> None:
    packed = quantize_sites(sites(), Budget(2.0))
    rates = {site.name: site.stored_bits() / site.parameters for site in packed}
    assert rates["c"] < rates["b"]  # its scaling is a twentieth


def test_an_unreachable_budget_names_the_interval() -> None:
    with pytest.raises(BudgetError, match=r"reachable interval is \[1\.\d+, 4\.\d+\]"):
        quantize_sites(sites(), Budget(1.0))


@pytest.mark.parametrize("bits", [0, -1, float("nan"), float("inf"), "2", True])
def test_a_budget_that_is_none_is_refused(bits) -> None:
    with pytest.raises(BudgetError):
        Budget(bits)


def test_a_wrong_group_is_refused() -> None:
    with pytest.raises(RecipeError, match="group is 0"):
        Budget(2.0, 0)


def test_the_same_adapter_is_packed_to_the_same_bytes() -> None:
    for method in (Budget(1.7), LoRAQuant(), LoRAQuant(clip="ste")):
        first, second = (quantize_sites(sites(), method) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert a.a.segments == b.a.segments and a.b.segments == b.b.segments
            assert torch.equal(a.a.codes, b.a.codes) and torch.equal(a.b.codes, b.b.codes)
            assert torch.equal(a.a.scales, b.a.scales) and torch.equal(a.b.zeros, b.b.zeros)


def test_candidates_of_no_direction_below_one_bit_reach_the_solver() -> None:
    lowest = min(candidates(sites()[0], -1), key=lambda c: c.bits)
    assert lowest.bits == 8 * (128 + 256 + 32)


def test_errors_and_energies_are_those_of_the_packed_sites() -> None:
    adapters = sites()
    for factors, done in zip(adapters, quantized_sites(adapters, Budget(2.0)), strict=True):
        found = balanced(factors)
        values = (done.site.b.dequantize(), done.site.a.dequantize())
        assert done.error == pytest.approx(relative_error(found, *values))
        energy = factors.scaling**2 * float(found.sigma.square().sum())
        assert done.energy == pytest.approx(energy, rel=1e-4)
