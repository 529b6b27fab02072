"""The SVD of a product from its factors, and a basis in which every direction carries alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.adapters.factors import LowRank, balanced, energy, relative_error, spread
from lowra.compiler.errors import AdapterError
from tests.adapters.adapters import dense, low_rank, product, share

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 999))


def random(n: int, k: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, k, generator=generator)
    return LowRank("site", a, torch.randn(n, rank, generator=generator), 1.0)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_the_svd_from_the_factors_is_that_of_the_dense_product(sizes) -> None:
    factors = random(*sizes)
    found = balanced(factors)
    values = torch.linalg.svdvals(dense(factors))[: found.rank]
    torch.testing.assert_close(found.sigma.double(), values, rtol=1e-5, atol=1e-5 * values[0])
    torch.testing.assert_close(product(found), dense(factors), rtol=1e-5, atol=1e-4)
    assert found.rank == min(factors.n, factors.k, factors.rank)
    # balanced: b_i and a_i have the same length, sqrt(sigma_i), and are orthogonal to the others
    for side in (found.b.double(), found.a.double()):
        gram = side @ side.T
        torch.testing.assert_close(gram, torch.diag(values), rtol=1e-4, atol=1e-4 * values[0])


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_spreading_keeps_the_product(sizes) -> None:
    found = balanced(random(*sizes))
    torch.testing.assert_close(product(spread(found)), product(found), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 3, 6, 8, 12, 16])
def test_spread_directions_carry_alike(rank: int) -> None:
    found = balanced(low_rank(rank=rank, decay=0.5))
    mixed = spread(found)
    mean = float(found.sigma.mean())
    limit = mean * (1.0001 if rank & (rank - 1) == 0 else 2.0)
    assert float(mixed.sigma.max()) <= limit
    assert float(found.sigma.max()) > 1.3 * mean


def test_signs_are_defined_so_that_equal_products_give_equal_directions() -> None:
    factors = low_rank()
    flipped = LowRank("site", -factors.a, -factors.b, 2.0)
    first, second = balanced(factors), balanced(flipped)
    torch.testing.assert_close(first.b, second.b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first.a, second.a, rtol=1e-4, atol=1e-6)


def test_relative_error_is_that_of_dense_products() -> None:
    factors = low_rank()
    found = balanced(factors)
    b, a = found.b + 0.02 * torch.randn_like(found.b), found.a + 0.02 * torch.randn_like(found.a)
    expected = share(dense(factors), b.double().T @ a.double())
    assert relative_error(found, b, a) == pytest.approx(expected, rel=1e-4)
    assert energy(found) == pytest.approx(float(dense(factors).square().sum()), rel=1e-5)


@pytest.mark.parametrize("role", ["a", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(role: str, value: float) -> None:
    parts = {"a": torch.ones(2, 4), "b": torch.ones(3, 2)}
    parts[role][0, 1] = value
    with pytest.raises(AdapterError, match=f"lora_{role.upper()} of up holds 1 values"):
        LowRank("up", parts["a"], parts["b"], 1.0)


def test_factors_that_do_not_meet_are_refused() -> None:
    with pytest.raises(AdapterError, match="rank 3.*rank 2"):
        LowRank("up", torch.ones(3, 4), torch.ones(5, 2), 1.0)
    with pytest.raises(AdapterError, match="not matrices"):
        LowRank("conv", torch.ones(3, 4, 1, 1), torch.ones(5, 3, 1, 1), 1.0)
    with pytest.raises(AdapterError, match="not floating point"):
        LowRank("up", torch.ones(3, 4, dtype=torch.int32), torch.ones(5, 3), 1.0)
    with pytest.raises(AdapterError, match="scaling"):
        LowRank("up", torch.ones(3, 4), torch.ones(5, 3), float("nan"))


def test_a_zero_product_has_zero_directions_and_no_error() -> None:
    found = balanced(LowRank("up", torch.randn(3, 8), torch.zeros(6, 3), 1.0))
    assert not found.sigma.any() and not found.b.any() and not found.a.any()
    assert relative_error(found, found.b, found.a) == 0
