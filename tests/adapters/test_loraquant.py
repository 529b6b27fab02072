"""LoRAQuant as published: its bits by the formula, its variants in the order that it reports."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.adapters.factors import LowRank, balanced, relative_error
from lowra.adapters.group_rtn import round_to_nearest
from lowra.adapters.loraquant import CLIPS, LoRAQuant
from lowra.adapters.optimise import RELEASED, STRAIGHT_THROUGH, fake_quantized, optimised
from lowra.adapters.split import formula_bits, split_rank
from lowra.compiler.errors import RecipeError
from tests.adapters.adapters import low_rank

POINTS = [(2, 0.8), (2, 0.9), (3, 0.8), (3, 0.9)]


def error(factors: LowRank, method: LoRAQuant) -> float:
    site = method.quantize(factors)
    return relative_error(balanced(factors), site.b.dequantize(), site.a.dequantize())


@pytest.mark.parametrize(("bits", "rho"), POINTS)
@pytest.mark.parametrize("split", ["paper", "released"])
def test_stored_bits_are_the_formulas(bits: int, rho: float, split: str) -> None:
    factors = low_rank(512, 1024, 16, 0.85)
    high = split_rank(balanced(factors).sigma, rho, split)
    site = LoRAQuant(bits, rho, split=split).quantize(factors)
    assert site.a.segments[0].rows == site.b.segments[0].rows == high
    stored = site.stored_bits() / site.parameters
    filled = 2 * 7 / site.parameters  # each factor's zero points end on a whole byte
    assert formula_bits(high / 16, bits) <= stored <= formula_bits(high / 16, bits) + filled


@pytest.mark.parametrize(
    ("bits", "high", "published"), [(2, (8, 8, 9, 8, 8, 9, 8, 8), 1.65), (3, (11, 11, 11, 10), 2.5)]
)
def test_bits_at_the_papers_shares_are_the_published_ones(bits, high, published) -> None:
    """f = 0.52 for 2@0.8 and 0.68 for 3@0.9 on LLaMA-2-7B (adapters.md, 1.4)."""
    total, parameters = 0, 0
    for rows in high:
        # sigma is 1 for the first `rows` directions and tiny for the others: rho = 0.999 cuts there
        sigma = torch.cat((torch.ones(rows), torch.full((16 - rows,), 1e-3)))
        q = [torch.linalg.qr(torch.randn(size, 16))[0] for size in (1024, 512)]
        site = LoRAQuant(bits, 0.999).quantize(LowRank("x", (q[0] * sigma).T, q[1], 1.0))
        total, parameters = total + site.stored_bits(), parameters + site.parameters
    share = sum(high) / (16 * len(high))
    assert total / parameters == pytest.approx(formula_bits(share, bits), abs=2e-3)
    assert total / parameters == pytest.approx(published, abs=0.02)


@pytest.mark.parametrize(("bits", "rho"), [(2, 0.8), (3, 0.9)])
def test_unoptimised_variants_are_worse_than_optimised_ones(bits: int, rho: float) -> None:
    factors = low_rank(512, 768, 8, 0.8)
    errors = {clip: error(factors, LoRAQuant(bits, rho, clip=clip)) for clip in CLIPS}
    assert errors["search"] < 0.99 * errors["none"]
    assert errors["released"] < 0.99 * errors["none"]
    assert errors["ste"] < errors["none"]
    # the released steps learn where to clip, which the search finds in closed form
    assert errors["search"] == pytest.approx(errors["released"], rel=0.05)


@pytest.mark.parametrize("descent", [STRAIGHT_THROUGH, RELEASED])
def test_optimised_vectors_are_never_worse_for_any_direction(descent) -> None:
    b, a = 0.02 * torch.randn(5, 256), 0.02 * torch.randn(5, 384)
    moved_b, moved_a = optimised(b, a, 2, 128, descent)

    def distance(b_hat: torch.Tensor, a_hat: torch.Tensor) -> torch.Tensor:
        whole = torch.einsum("rn,rk->rnk", b, a)
        return (whole - torch.einsum("rn,rk->rnk", b_hat, a_hat)).flatten(1).norm(dim=1)

    before = distance(*(fake_quantized(x, 2, 128, True) for x in (b, a)))
    after = distance(*(fake_quantized(x, 2, 128, True) for x in (moved_b, moved_a)))
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.95 * before.sum()


def test_a_straight_through_gradient_reaches_every_value_and_the_released_one_two_a_group() -> None:
    w = torch.randn(1, 1024)
    counts = {}
    for through in (True, False):
        moved = w.clone().requires_grad_()
        (fake_quantized(moved, 2, 128, through) - w).square().sum().backward()
        assert moved.grad is not None
        counts[through] = int((moved.grad != 0).sum())
    # adapters.md, 1.3: 16 of 1024 values with 8 groups
    assert counts[False] == 16 and counts[True] > 1000


def test_fake_rounding_is_what_is_stored() -> None:
    w = torch.randn(4, 300)
    stored = round_to_nearest(w, 3, 128).values()
    close = (fake_quantized(w, 3, 128, True) - stored).abs() < 0.01
    assert close.double().mean() > 0.99


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 50), st.integers(1, 50), st.integers(1, 9), st.sampled_from([2, 3, 4]),
    st.floats(0.05, 1.0), st.sampled_from([-1, 1, 7, 32, 128]), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_group_packs_at_its_own_price(n, k, rank, bits, rho, group, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, k, generator=generator)
    factors = LowRank("x", a, torch.randn(n, rank, generator=generator), 1.0)
    site = LoRAQuant(bits, rho, group, clip="none").quantize(factors)
    high = split_rank(balanced(factors).sigma, rho)
    directions = min(n, k, rank)

    def price(length: int) -> int:
        groups = 1 if group == -1 else math.ceil(length / group)
        words = 32 * math.ceil(length / 32)
        zeros = 8 * math.ceil(high * groups * bits / 8)
        return (
            high * (bits * words + 16 * groups)
            + zeros
            + (directions - high) * (words + 16 * groups)
        )

    assert site.stored_bits() == price(n) + price(k)
    b_hat, a_hat = site.dense()[1], site.dense()[0]
    assert b_hat.shape == (n, rank) and a_hat.shape == (rank, k)
    assert bool(torch.isfinite(b_hat).all()) and bool(torch.isfinite(a_hat).all())


def test_more_bits_and_more_coverage_lose_less() -> None:
    factors = low_rank(512, 512, 16, 0.85)
    lost = [error(factors, LoRAQuant(*point)) for point in POINTS]
    assert lost[1] < lost[0] and lost[3] < lost[2] < lost[0]
    assert error(factors, LoRAQuant(4, 1.0)) < 0.04


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rho": 0}, "rho is 0"),
        ({"rho": 1.5}, "rho is 1.5"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"rho": "0.8"}, "rho is '0.8'"),
        ({"bits": 1}, "bits of the high part are 1"),
        ({"bits": 5}, "are 5; give 2, 3 or 4"),
        ({"group": 0}, "group is 0"),
        ({"group": 12.5}, "group is 12.5"),
        ({"split": "papers"}, "split is 'papers'; nearest: paper"),
        ({"clip": "serch"}, "clip is 'serch'; nearest: search"),
    ],
)
def test_wrong_options_are_refused(fields, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        LoRAQuant(**fields)
