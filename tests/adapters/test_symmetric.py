"""Signs with the least-squares scale, and tables of levels with scales that shorten nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.adapters.symmetric import Fitting, signed
from lowra.compiler.grids import WIDTHS, levels

GAUSSIAN = {1: 0.36338, 1.6: 0.190174, 2: 0.117482, 3: 0.034548, 4: 0.009501}
"""Mean squared error of the least-squares quantisers of a normal variable (Max, 1960)."""


def rows(length: int, count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [-1, 40, 128])
def test_one_bit_is_the_sign_times_the_mean_magnitude(group: int) -> None:
    w = rows(200)
    size = 200 if group == -1 else group
    expected = torch.cat(
        [p.sign() * p.abs().mean(1, keepdim=True) for p in w.split(size, 1)], dim=1
    )
    torch.testing.assert_close(signed(w, group).values(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("width", [w for w in WIDTHS if w > 1])
def test_levels_are_the_centroids_of_the_normal_density(width: float) -> None:
    table = levels(width).double().tolist()
    edges = [-math.inf, *((a + b) / 2 for a, b in zip(table, table[1:], strict=False)), math.inf]

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x: float) -> float:
        return (1 + math.erf(x / math.sqrt(2))) / 2

    for level, low, high in zip(table, edges, edges[1:], strict=False):
        centroid = (density(low) - density(high)) / (below(high) - below(low))
        assert level == pytest.approx(centroid, abs=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_normal_values_lose_what_a_quantiser_without_bias_loses(width: float) -> None:
    """With the least-squares scale a part e is lost; made longer by 1 / (1 - e), e / (1 - e) is."""
    w = rows(8192)
    lost = float((Fitting(w, -1).coded(width).values() - w).square().mean() / w.square().mean())
    least = GAUSSIAN[width]
    assert lost == pytest.approx(least / (1 - least), rel=0.06)


@pytest.mark.parametrize("group", [-1, 48])
@pytest.mark.parametrize("width", WIDTHS)
def test_no_vector_gets_shorter(width: float, group: int) -> None:
    w = rows(300)
    values = Fitting(w, group).coded(width).values()
    torch.testing.assert_close((values * w).sum(1), w.square().sum(1), rtol=1e-3, atol=0)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(WIDTHS), st.integers(1, 90), st.sampled_from([-1, 1, 16, 64]),
    st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_the_loss_that_is_told_is_the_loss_of_the_codes(width, length, group, seed, size) -> None:
    w = size * rows(length, seed=seed)
    fitting = Fitting(w, group)
    values = fitting.coded(width).values()
    lost = (values - w).double().square().sum(1)
    scale = w.double().square().sum(1)
    torch.testing.assert_close(fitting.losses(width).double() / scale, lost / scale,
                               rtol=1e-3, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_codes_are_those_of_the_best_scale(width: float) -> None:
    """Under no scale nearby would the nearest codes, at their least-squares length, lose less."""
    w = rows(256, count=1)
    table = levels(width)

    def least(values: Tensor) -> float:
        """The squared error of w against values of the best length."""
        return float(w.square().sum() - (w * values).sum().square() / values.square().sum())

    ours = least(Fitting(w, -1).coded(width).values())
    for scale in torch.linspace(0.2, 3, 281).tolist():
        codes = (w[..., None] - table * scale).abs().argmin(-1)
        assert ours <= least(table[codes]) * 1.003 + 1e-6


@pytest.mark.parametrize("width", WIDTHS)
def test_zeros_stay_zeros(width: float) -> None:
    values = Fitting(torch.zeros(2, 40), 32).coded(width).values()
    assert not values.any()
