"""Gradients of codebooks and scales through a packed weight, against autograd on a dense one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowra.compiler.levels import ascending, spacings
from lowra.compiler.storage import PackedWeight, with_tables
from lowra.passes.rounding.panels import rotated_values, take_apart
from lowra.passes.tuning.packed_product import packed_product
from tests.passes.tuning.test_latents import LAYOUTS, K, N, packed

RAGGED = [(24, True), (24, False)]  # 64 columns: the last group is shorter


def dense_weight(weight: PackedWeight, codebooks: Tensor, scales: Tensor | None) -> Tensor:
    """[N, K] in rotated coordinates as a formula, one gather per row, float64."""
    sizes = [t.numel() // (1 if weight.shared else len(t)) for t in _tables(weight)]
    rows: dict[int, Tensor] = {}
    start = stored = 0
    for panel, size in zip(take_apart(weight), sizes, strict=True):
        for place, index in enumerate(panel.index.tolist()):
            first = start if weight.shared else start + place * size
            row = codebooks[first : first + size][panel.codes[place].long()]
            if scales is not None:
                count = scales.numel() // N
                group = K if count == 1 else weight.group
                own = scales[stored * count : (stored + 1) * count]
                row = row * own.repeat_interleave(group)[:K]
            rows[index] = row
            stored += 1
        start += size * (1 if weight.shared else len(panel.index))
    return torch.stack([rows[index] for index in range(N)])


def _tables(weight: PackedWeight) -> list[Tensor]:
    return [panel.levels for panel in take_apart(weight)]


@pytest.mark.parametrize(("group", "shared"), LAYOUTS + RAGGED)
def test_gradients_are_those_of_the_dense_product(group: int, shared: bool) -> None:
    weight = packed(group, shared)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, K, generator=generator, dtype=torch.float64, requires_grad=True)
    other = torch.randn(2, 5, N, generator=generator, dtype=torch.float64)
    codebooks = weight.codebooks.double().requires_grad_()
    scales = None if weight.scales is None else weight.scales.double().requires_grad_()
    inputs = [x, codebooks, *(() if scales is None else (scales,))]
    y = packed_product(x, codebooks, scales, weight)
    reference = functional.linear(x, dense_weight(weight, codebooks, scales))
    assert torch.allclose(y, reference, atol=1e-4)
    got = torch.autograd.grad((y * other).sum(), inputs)
    want = torch.autograd.grad((reference * other).sum(), inputs)
    for one, two in zip(got, want, strict=True):
        assert torch.allclose(one.double(), two, rtol=1e-4, atol=1e-4)


def test_a_levels_gradient_is_the_slope_of_finite_differences() -> None:
    weight = packed(-1, True)
    generator = torch.Generator().manual_seed(1)
    x, other = torch.randn(5, K, generator=generator), torch.randn(5, N, generator=generator)

    def value(codebooks: Tensor) -> float:
        moved = rotated_values(with_tables(weight, codebooks, weight.scales), torch.float64)
        return float((functional.linear(x.double(), moved) * other).sum())

    codebooks = weight.codebooks.float().requires_grad_()
    y = packed_product(x, codebooks, weight.scales, weight)
    (grad,) = torch.autograd.grad((y * other).sum(), [codebooks])
    for place in (0, 7, 16, 25):
        ends = [codebooks.detach().clone() for _ in range(2)]
        ends[0][place] -= 0.125
        ends[1][place] += 0.125
        width = float(ends[1][place].half()) - float(ends[0][place].half())
        slope = (value(ends[1]) - value(ends[0])) / width
        assert float(grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_a_frozen_weight_keeps_no_input_and_gives_no_gradient() -> None:
    weight = packed(-1, True)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y = packed_product(x, weight.codebooks, weight.scales, weight)
    assert y.grad_fn is not None and not y.grad_fn.saved_tensors  # pyright: ignore
    (grad,) = torch.autograd.grad(y.sum(), [x])
    assert torch.allclose(grad, rotated_values(weight).sum(0).expand(3, K), atol=1e-5)


@pytest.mark.parametrize(("group", "shared"), LAYOUTS)
def test_levels_that_would_pass_each_other_meet(group: int, shared: bool) -> None:
    weight = packed(group, shared)
    noise = torch.randn(weight.codebooks.shape, generator=torch.Generator().manual_seed(3))
    moved = weight.codebooks.float() + 3 * spacings(weight) * noise
    for panel in take_apart(with_tables(weight, ascending(weight, moved), weight.scales)):
        assert bool((panel.levels.diff(dim=-1) >= 0).all())
    assert torch.equal(ascending(weight, weight.codebooks.float()), weight.codebooks.float())
