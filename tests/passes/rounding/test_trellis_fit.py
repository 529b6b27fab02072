"""Trellis codebooks fitted to rows: scales follow, weights count, and the loss is what is lost."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.compiler.trellis import RUN
from lowra.passes.rounding.feedback import nearest_codes
from lowra.passes.rounding.lloyd import fit_shared, gaussian_levels
from lowra.passes.rounding.trellis_fit import fit_trellis


def fitted(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, scales and losses at 2 bits, and the losses with the best four levels."""
    start = fit_shared(values, weights, [gaussian_levels(3)])[0]
    fit = fit_trellis(values, weights, start)
    return fit.levels, fit.scale, fit.loss


def drawn(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def test_scales_follow_the_rows_and_levels_do_not() -> None:
    values, weights = drawn(100, 200), torch.ones(1, 200)
    levels, scale, loss = fitted(values, weights)
    eight_times, its_scale, its_loss = fitted(8 * values, weights)
    torch.testing.assert_close(eight_times * its_scale.mean(), 8 * levels * scale.mean(), rtol=1e-3,
                               atol=1e-3)  # fmt: skip
    torch.testing.assert_close(its_loss, 64 * loss, rtol=1e-3, atol=0)


def test_columns_of_weight_zero_count_for_nothing() -> None:
    values, weights = drawn(70, 120), torch.ones(1, 120)
    wild = torch.cat((values, 100 * drawn(70, 30)), 1)
    silent = torch.cat((weights, torch.zeros(1, 30)), 1)
    for one, other in zip(fitted(values, weights), fitted(wild, silent), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_the_loss_is_that_of_the_best_paths() -> None:
    values, weights = drawn(150, 90), torch.rand(1, 90)
    levels, scale, loss = fitted(values, weights)
    tables = levels.float().expand(150, -1).contiguous()
    codes = nearest_codes(values, tables, scale.float()[:, None], -1, runs=torch.arange(150) // RUN)
    lost = ((values - levels[codes] * scale[:, None]) ** 2 * weights).sum(1)
    torch.testing.assert_close(loss.sum(), lost.sum(), rtol=0.01, atol=0)
    plain = fit_shared(values, weights, [gaussian_levels(2)])[0].loss
    assert float(loss.sum()) < 0.75 * float(plain.sum())
