"""Weighted Lloyd: losses never rise, known optima are found, odd rows do no harm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.backends.cpu import fitting
from lowra.passes.rounding import lloyd
from lowra.passes.rounding.lloyd import Fit, gaussian_levels, normal_float

ROUNDS = (1, 2, 3, 5, 9, 20, 60)
FAST = settings(max_examples=25, deadline=None, derandomize=True)


Rows = tuple[Tensor, Tensor]


@pytest.fixture(params=["C++", "torch"], autouse=True, scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs on the built kernels, and on plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(fitting, "library", lambda name: None)
        yield


def fit_rows(rows: Rows, start: Tensor, iterations: int = 200, tolerance: float = 1e-6) -> Fit:
    return lloyd.fit_rows(*rows, [start], iterations, tolerance)[0]


def fit_shared(rows: Rows, start: Tensor, iterations: int = 200, tolerance: float = 1e-6) -> Fit:
    return lloyd.fit_shared(*rows, [start], iterations, tolerance)[0]


def drawn_rows(n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Values and weights float32 [n, k], some weights zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator)
    weights = torch.rand(n, k, generator=generator)
    return values, torch.where(weights < 0.1, 0.0, weights)


def rounding_loss(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Weighted squared error [n] of every value rounded to its nearest level [n, L], directly."""
    distance = (values.double().unsqueeze(2) - levels.double().unsqueeze(1)).abs().amin(2)
    return (weights.double().expand_as(values) * distance**2).sum(1)


def exact_kmeans(values: list[float], weights: list[float], count: int) -> float:
    """The least loss of `count` levels, by dynamic programming over sorted intervals."""
    pairs = sorted(zip(values, weights, strict=True))

    def interval(a: int, b: int) -> float:
        mass = sum(w for _, w in pairs[a:b])
        if not mass:
            return 0.0
        mean = sum(v * w for v, w in pairs[a:b]) / mass
        return sum(w * (v - mean) ** 2 for v, w in pairs[a:b])

    k = len(pairs)
    best = [0.0] + [math.inf] * k
    for _ in range(count):
        best = [min(best[a] + interval(a, b) for a in range(b + 1)) for b in range(k + 1)]
    return best[k]


@FAST
@given(st.integers(1, 4), st.integers(1, 60), st.sampled_from([1, 2, 3]), st.integers(0, 99))
def test_loss_never_rises(n: int, k: int, width: int, seed: int) -> None:
    rows = drawn_rows(n, k, seed)
    start = gaussian_levels(width).expand(n, -1)
    fits = [fit_rows(rows, start, iterations=i, tolerance=0.0) for i in ROUNDS]
    losses = [float(fit.loss.sum()) for fit in fits]
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in zip(losses, losses[1:], strict=False))
    assert all(bool((fit.levels.diff(dim=1) >= 0).all()) for fit in fits)


@FAST
@given(st.integers(2, 6), st.integers(20, 80), st.sampled_from([1, 2, 3]), st.integers(0, 99))
def test_shared_loss_never_rises_on_rows_of_one_kind(n: int, k: int, width: int, seed: int) -> None:
    values, weights = drawn_rows(n, k, seed)
    rows = (values * torch.arange(1, n + 1).view(-1, 1), weights)
    starts = [gaussian_levels(width)]
    fits = [torch.ops.lowra.lloyd_shared(*rows, starts, i, 0.0) for i in ROUNDS]
    losses = [float(loss.sum()) for _, loss in fits]
    assert all(b <= a * (1 + 1e-9) for a, b in zip(losses, losses[1:], strict=False))
    assert bool((fits[-1][0].diff() > 0).all())
    assert bool((fit_shared(rows, starts[0]).scale > 0).all())


@FAST
@given(st.integers(1, 4), st.integers(1, 50), st.sampled_from([1, 2, 3]), st.integers(0, 99))
def test_converged_loss_is_that_of_rounding_to_the_nearest_level(
    n: int, k: int, width: int, seed: int
) -> None:
    values, weights = drawn_rows(n, k, seed)
    rows = (values, weights)
    fit = fit_rows(rows, gaussian_levels(width).expand(n, -1), iterations=500, tolerance=0.0)
    direct = rounding_loss(values, weights, fit.levels)
    torch.testing.assert_close(fit.loss, direct, rtol=1e-6, atol=1e-9)


def test_converged_shared_loss_is_that_of_rounding_to_the_scaled_levels() -> None:
    values, weights = drawn_rows(5, 80, 4)
    fit = fit_shared((values, weights), gaussian_levels(2), 500, 0.0)
    direct = rounding_loss(values, weights, fit.scale[:, None] * fit.levels)
    torch.testing.assert_close(fit.loss, direct, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_rows_of_as_many_values_as_levels_are_stored_exactly(width: int) -> None:
    count = 1 << width
    levels = torch.arange(count).float() * 2 - count + 1
    values = levels[torch.arange(3 * 40).view(3, 40) % count]
    fit = fit_rows((values, torch.ones(1, 1)), levels.expand(3, -1) * 1.1)
    torch.testing.assert_close(fit.levels, levels.double().expand(3, -1))
    assert float(fit.loss.sum()) < 1e-9
    scaled = values * torch.tensor([[1.0], [2.0], [0.5]])
    fit = fit_shared((scaled, torch.ones(1, 1)), levels)
    assert float(fit.loss.sum()) < 1e-6


@FAST
@given(st.integers(0, 99), st.sampled_from([1, 2]), st.integers(3, 14))
def test_the_exact_optimum_bounds_the_loss_and_is_a_fixed_point(
    seed: int, width: int, k: int
) -> None:
    values, weights = drawn_rows(1, k, seed)
    weights = weights + 0.05
    best = exact_kmeans(values[0].tolist(), weights[0].tolist(), 1 << width)
    rows = (values, weights)
    starts = [gaussian_levels(width), *(values[0, torch.randperm(k)[: 1 << width]].sort()[0]
              for _ in range(40) if k >= 1 << width)]  # fmt: skip
    losses = [float(fit_rows(rows, start.expand(1, -1)).loss) for start in starts]
    assert min(losses) >= best * (1 - 1e-9) - 1e-12
    if len(losses) > 1:  # the best of many starts is the optimum, or very near
        assert min(losses) <= 1.05 * best + 1e-9


@FAST
@given(st.integers(0, 99), st.sampled_from([1, 2]), st.integers(1, 30), st.sampled_from([0.3, 3]))
def test_short_rows_reach_the_exact_optimum(seed: int, width: int, k: int, tail: float) -> None:
    """With every border a candidate, the start is the optimum and Lloyd stays there."""
    values, weights = drawn_rows(1, k, seed)
    values = values.sign() * values.abs() ** tail
    best = exact_kmeans(values[0].tolist(), weights[0].tolist(), 1 << width)
    fit = lloyd.fit_rows_globally(values, weights, [gaussian_levels(width).expand(1, -1)])[0]
    energy = float((weights * values**2).sum())
    assert best * (1 - 1e-9) - 1e-12 <= float(fit.loss) <= best + 1e-6 * energy + 1e-12
    assert bool((fit.levels.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("tail", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("width", [1, 2])
def test_long_rows_come_within_a_percent_of_the_optimum(width: int, tail: float) -> None:
    """Lloyd alone is off by more than that in a third of Gaussian rows, in all skewed ones."""
    values, weights = drawn_rows(1, 220, 7)
    values = values.abs() ** tail
    best = exact_kmeans(values[0].tolist(), weights[0].tolist(), 1 << width)
    fit = lloyd.fit_rows_globally(values, weights, [gaussian_levels(width).expand(1, -1)])[0]
    assert best * (1 - 1e-9) <= float(fit.loss) <= 1.01 * best


def test_the_better_start_is_kept_row_by_row() -> None:
    rows = drawn_rows(9, 300, 3)
    starts = [gaussian_levels(b).expand(9, -1) for b in (1, 3, 4, 8)]
    plain, found = lloyd.fit_rows(*rows, starts), lloyd.fit_rows_globally(*rows, starts)
    for one, other in zip(plain, found, strict=True):
        assert bool((other.loss <= one.loss).all())
        got = rounding_loss(*rows, other.levels)
        torch.testing.assert_close(got, other.loss, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "positive"),
    [
        (1, [0.7979]),
        (1.6, [0.0, 1.2240]),
        (2, [0.4528, 1.5104]),
        (3, [0.2451, 0.7560, 1.3439, 2.1520]),
    ],
)
def test_gaussian_levels_are_those_of_lloyd_and_max(width: int, positive: list[float]) -> None:
    """J. Max, Quantizing for minimum distortion, 1960, table 1."""
    levels = gaussian_levels(width)
    expected = torch.tensor([-x for x in reversed(positive) if x] + positive, dtype=torch.float64)
    torch.testing.assert_close(levels, expected, rtol=0, atol=4e-3)


@pytest.mark.parametrize("width", [1, 1.6, 2, 3, 4, 8])
def test_starting_levels_rise_and_gaussian_ones_are_symmetric(width: int) -> None:
    levels = gaussian_levels(width)
    assert torch.equal(levels, -levels.flip(0)) and bool((levels.diff() > 0).all())
    paper = normal_float(width)
    assert paper.shape == levels.shape and bool((paper.diff() > 0).all())
    assert float(paper[0]) == -1.0 and float(paper[-1]) == 1.0


ODD: dict[str, Tensor] = {
    "constant": torch.full((2, 20), 3.5),
    "constant negative": torch.full((2, 20), -1e-4),
    "all zero": torch.zeros(2, 20),
    "one zero row": torch.stack((torch.zeros(20), torch.linspace(-1, 1, 20))),
    "one outlier": torch.cat((torch.linspace(-1, 1, 38).view(2, 19), torch.full((2, 1), 1e6)), 1),
    "one column": torch.tensor([[1.0], [-2.0]]),
    "all positive": torch.linspace(5, 6, 40).view(2, 20),
    "tiny": torch.linspace(-1, 1, 40).view(2, 20) * 1e-30,
    "huge": torch.linspace(-1, 1, 40).view(2, 20) * 1e30,
}
FITS: dict[str, Callable[[Rows, Tensor], Fit]] = {
    "per row": lambda rows, start: fit_rows(rows, start.expand(2, -1)),
    "global": lambda rows, start: lloyd.fit_rows_globally(*rows, [start.expand(2, -1)])[0],
    "shared": fit_shared,
}


@pytest.mark.parametrize("weight", [1.0, 0.0, 1e-20], ids=["weight 1", "weight 0", "tiny weight"])
@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("what", ODD)
def test_odd_rows_give_finite_levels(what: str, kind: str, weight: float) -> None:
    rows = (ODD[what], torch.full((1, 1), weight))
    for width in (1, 2, 4):
        fit = FITS[kind](rows, gaussian_levels(width))
        for tensor in (fit.levels, fit.scale, fit.loss):
            assert bool(torch.isfinite(tensor).all()), f"{width} bits"
        assert bool((fit.loss >= 0).all())


@pytest.mark.parametrize("kind", FITS)
def test_constant_rows_are_stored_exactly(kind: str) -> None:
    rows = (ODD["constant"], torch.ones(1, 1))
    loss = FITS[kind](rows, gaussian_levels(2)).loss
    assert bool((loss <= 1e-9 * (rows[0] ** 2).sum(1)).all())


def test_columns_of_no_weight_do_not_count() -> None:
    values = torch.tensor([[-1.0, 1.0, 500.0]])
    fit = fit_rows((values, torch.tensor([[1.0, 1.0, 0.0]])), torch.tensor([[-0.5, 0.5]]))
    torch.testing.assert_close(fit.levels, torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
    assert float(fit.loss) < 1e-12


def test_an_empty_bin_keeps_its_level() -> None:
    rows = (torch.tensor([[1.0, 1.2]]), torch.ones(1, 1))
    levels = fit_rows(rows, torch.tensor([[-9.0, 1.0]])).levels[0].tolist()
    assert levels == pytest.approx([-9.0, 1.1])


def test_rounds_are_counted() -> None:
    """The paper asks for two."""
    rows = drawn_rows(2, 50, 0)
    start = normal_float(2).expand(2, -1)
    two = fit_rows(rows, start, iterations=2, tolerance=0.0)
    once = fit_rows(rows, start, iterations=1, tolerance=0.0)
    again = fit_rows(rows, once.levels, iterations=1, tolerance=0.0)
    assert torch.equal(two.levels, again.levels) and not torch.equal(two.levels, once.levels)
