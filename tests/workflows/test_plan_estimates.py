"""Estimates: the error of a mix of widths, and the constants against the committed measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowra.passes.rounding.lloyd import gaussian_levels
from lowra.workflows.plan_estimates import COSTS, GAUSSIAN_ERROR, expected_error

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "compile.json"


def error_at(budget: float) -> float:
    return expected_error({1: 1.1, 2: 2.1, 3: 3.1}, budget)["relative_error"]


def test_the_error_of_one_width_is_a_gaussians_and_between_two_it_is_mixed() -> None:
    assert error_at(2.1) == pytest.approx(0.1175)
    assert error_at(1.6) == pytest.approx((0.363 + 0.1175) / 2)
    assert error_at(0.5) == 0.363 and error_at(9) == 0.0345


def test_a_width_above_the_hull_is_not_used() -> None:
    assert expected_error({1: 1.0, 2: 3.0, 3: 3.1}, 2.05)["relative_error"] < 0.2


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_gaussian_errors_are_those_of_lloyds_levels(width: int) -> None:
    import torch

    levels = gaussian_levels(width).double()
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2)
    error = ((x[:, None] - levels).abs().min(1).values ** 2 * density).sum() / density.sum()
    assert float(error) == pytest.approx(GAUSSIAN_ERROR[width], rel=0.03)


def test_the_constants_are_within_a_factor_of_three_of_the_committed_measurement() -> None:
    """compile.json may be renewed; the constants must not drift away from it unseen."""
    data = json.loads(RESULT.read_text())
    weights, tokens = data["weights"], data["calibration_tokens"]
    drivers = {
        "sites": 210, "rows": 155520, "weight-tokens": weights * tokens,
        "weight-gradients": weights * 2048, "weight-widths": 4 * weights,
        "weight-columns": 8.664e10,
    }  # fmt: skip
    for name, cost in COSTS.items():
        measured = data["seconds"].get(name, 0)
        if measured > 2:
            assert 1 / 3 < cost.seconds * drivers[cost.driver] / measured < 3, name
