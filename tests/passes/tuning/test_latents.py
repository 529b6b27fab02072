"""Latent weights start at the stored ones, round to their codebooks, and pass gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowra.compiler.packing import levels_of, width_id
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import PackedWeight, pack_weight, scale_groups
from lowra.passes.rounding.panels import put_together, rotated_values, take_apart
from lowra.passes.tuning.latents import LatentWeight, look_up, nearest, wanted_values
from tests.compiler.packed_weights import random_codes
from tests.passes.site_programs import correlated_gram

N, K = 11, 64


def packed(group: int, shared: bool, widths: tuple[int, ...] = (1, 2, 3, 4)) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    row_widths = torch.tensor(widths, dtype=torch.uint8)[torch.arange(N) % len(widths)]
    limit = 1 << row_widths.long()
    codes = (torch.rand(N, K, generator=generator) * limit.unsqueeze(1)).long()
    books: Any = torch.randn(N, 1 << max(widths), generator=generator).sort(1).values
    if shared:
        books = {b: torch.randn(1 << b, generator=generator).sort().values for b in widths}
    groups = scale_groups(K, group)
    scales = None if group == 0 else 0.5 + torch.rand(N, groups, generator=generator)
    return pack_weight(codes, row_widths, books, scales, group, Rotation(3, 64))


LAYOUTS = [(-1, True), (16, True), (-1, False), (16, False), (0, False)]


def equal(one: PackedWeight, other: PackedWeight) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[role], b[role]) for role in a)


@pytest.mark.parametrize(("group", "shared"), LAYOUTS)
def test_a_weight_taken_apart_and_put_together_is_the_same(group: int, shared: bool) -> None:
    weight = packed(group, shared)
    assert equal(put_together(take_apart(weight), weight), weight)


@pytest.mark.parametrize(("group", "shared"), LAYOUTS)
def test_latents_start_at_the_stored_codes_whatever_is_wanted(group: int, shared: bool) -> None:
    weight = packed(group, shared)
    wild = 5 * torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    latent = LatentWeight(weight, wild)
    assert equal(latent.stored(), weight)
    assert torch.allclose(latent.weight(torch.float32), rotated_values(weight), atol=1e-6)


@pytest.mark.parametrize(("group", "shared"), LAYOUTS)
def test_gradients_are_those_of_levels_times_scales_with_the_codes_held(
    group: int, shared: bool
) -> None:
    weight = packed(group, shared)
    latent = LatentWeight(weight, rotated_values(weight))
    other = torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    (latent.weight(torch.float32) * other).sum().backward()
    for panel in latent.panels:
        levels = panel.start.levels.double().requires_grad_()
        unit = panel.spacing.double()
        codes = panel.start.codes
        value = look_up(codes, levels)
        scales = panel.start.scales
        if scales is not None:
            scales = scales.double().requires_grad_()
            value = value * scales.repeat_interleave(K // scales.shape[1], dim=1)
        (value * other[panel.start.index]).sum().backward()
        assert levels.grad is not None
        assert torch.allclose(panel.level_offset.grad.double(), levels.grad * unit, atol=1e-4)
        if scales is not None:
            assert panel.scale_offset is not None
            relative = scales.grad * scales.detach()
            assert torch.allclose(panel.scale_offset.grad.double(), relative, atol=1e-4)


def on_trellis(group: int) -> PackedWeight:
    """More than a run of rows of 2 bits, and some of other widths, all but those of 4 in runs."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.tensor([12] * 70 + [11, 13, 4] * 3, dtype=torch.uint8)
    codes = random_codes(ids.tolist(), K, generator)
    books = {b: torch.randn(levels_of(width_id(b, True)), generator=generator).sort().values
             for b in (1, 2, 3, 4)}  # fmt: skip
    scales = 0.5 + torch.rand(len(ids), scale_groups(K, group), generator=generator)
    return pack_weight(codes, ids, books, scales, group, Rotation(3, 64))


@pytest.mark.parametrize("group", [-1, 16])
def test_trellis_codes_stay_while_their_levels_and_scales_move(group: int) -> None:
    weight = on_trellis(group)
    wild = 3 * torch.randn(weight.n, K, generator=torch.Generator().manual_seed(1))
    latent = LatentWeight(weight, wild)
    assert equal(latent.stored(), weight)
    assert torch.allclose(latent.weight(torch.float32), rotated_values(weight), atol=1e-6)
    assert [len(latents) for latents, _ in latent.latents()] == [3], "rows of 4 bits alone"
    latent.weight(torch.float32).square().sum().backward()
    levels, scales = latent.offsets()
    assert all(bool(offset.grad.abs().sum() > 0) for offset in (*levels, *scales))
    with torch.no_grad():
        for offset in (*levels, *scales):
            offset += 0.05 * torch.randn(offset.shape)
    moved = latent.stored()
    for old, new in zip(take_apart(weight), take_apart(moved), strict=True):
        assert torch.equal(old.codes, new.codes) or old.width == 4
        assert not torch.equal(old.levels, new.levels)
    assert torch.allclose(latent.weight(torch.float32), rotated_values(moved), atol=2e-3)


@pytest.mark.parametrize("shape", [(4,), (16,), (N, 4)])
def test_nearest_is_the_level_at_the_least_distance(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    levels = torch.randn(*shape, generator=generator).sort(-1).values
    values = 2 * torch.randn(N, K, generator=generator)
    distance = (look_up(nearest(values, levels), levels) - values).abs()
    every = levels if levels.dim() == 1 else levels.unsqueeze(1)
    assert torch.equal(distance, (every - values.unsqueeze(-1)).abs().min(-1).values)


def test_what_is_wanted_is_the_minimum_of_the_error_in_one_value() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, stored = (torch.randn(3, 8, generator=generator) for _ in range(2))
    gram = correlated_gram(8)
    wanted = wanted_values(weight, stored, gram)

    def error(value: Tensor) -> float:
        changed = stored.clone()
        changed[1, 5] = value
        e = weight[1] - changed[1]
        return float(e @ gram @ e)

    best = error(wanted[1, 5])
    assert all(error(wanted[1, 5] + step) > best for step in (-0.01, 0.01))
