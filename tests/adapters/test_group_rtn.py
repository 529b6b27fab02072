"""Asymmetric rounding follows the published formula, and clipping never loses by it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.adapters.group_rtn import clipped, round_to_nearest

BITS = pytest.mark.parametrize("bits", [2, 3, 4])


def released(w: Tensor, bits: int, group: int) -> Tensor:
    """The authors' quantization_utils.py: RTN of w viewed as [-1, group]."""
    w_groups = w.reshape(-1, group)
    high, low = w_groups.amax(1, keepdim=True), w_groups.amin(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / (2**bits - 1)
    zero = (-torch.round(low / scale)).clamp(0, 2**bits - 1)
    codes = torch.clamp(torch.round(w_groups / scale) + zero, 0, 2**bits - 1)
    return ((codes - zero) * scale).reshape(w.shape)


def rows(length: int, count: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed))


@BITS
@pytest.mark.parametrize("group", [32, 128])
def test_rounding_is_that_of_the_authors_code(bits: int, group: int) -> None:
    w = rows(512)
    values = round_to_nearest(w, bits, group).values()
    expected = released(w, bits, group)
    # scales are stored in float16, the code keeps them in float32: a value at the middle of two
    # levels may go to the other
    scale = expected.abs().max() / 2
    close = (values - expected).abs() <= 2e-3 * scale + 1e-6
    assert close.double().mean() > 0.99


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 3, 4]), st.integers(1, 70), st.sampled_from([-1, 1, 8, 32, 128]),
    st.integers(0, 99), st.sampled_from([1e-4, 1.0, 1e3]), st.sampled_from([-3.0, 0.0, 3.0]),
)  # fmt: skip
def test_every_value_is_within_half_a_step(bits, length, group, seed, size, shift) -> None:
    w = size * (rows(length, seed=seed) + shift)
    coded = round_to_nearest(w, bits, group)
    size_of_group = length if group == -1 else group
    step = coded.scales.float().repeat_interleave(size_of_group, 1)[:, :length]
    # the zero point rounds the range's end by half a step, float16 the step by 2^-11 of it
    # (and by 2^-25 where that is below its normal numbers)
    slack = step * (1.0 + 2**bits * 2**-10) + 2**bits * 2**-24
    assert ((coded.values() - w).abs() <= slack).all()
    assert coded.codes.max() < 2**bits and coded.zeros is not None and coded.zeros.max() < 2**bits


@BITS
@pytest.mark.parametrize("group", [-1, 48, 128])
def test_clipping_is_never_worse_than_rounding_in_any_group(bits: int, group: int) -> None:
    w = rows(300)
    size = 300 if group == -1 else group
    errors = []
    for coded in (clipped(w, bits, group), round_to_nearest(w, bits, group)):
        squares = (coded.values() - w).square()
        errors.append(torch.stack([part.sum(1) for part in squares.split(size, 1)]))
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    assert errors[0].sum() < errors[1].sum()


@BITS
def test_the_clip_search_finds_the_best_of_81_shares(bits: int) -> None:
    w = rows(128, count=40)
    shares = torch.arange(20, 101) / 100
    low, high = w.amin(1)[:, None] * shares, w.amax(1)[:, None] * shares
    scale = ((high - low) / (2**bits - 1)).half().float()[..., None]
    zero = (-torch.round(low / ((high - low) / (2**bits - 1))))[..., None]
    codes = (torch.round(w[:, None] / scale) + zero).clamp(0, 2**bits - 1)
    errors = ((codes - zero) * scale - w[:, None]).square().sum(2)
    found = (clipped(w, bits, 128).values() - w).square().sum(1)
    # coarse to fine instead of all 81: the same minimum in nearly every group, and never far off
    assert (found <= errors.min(1).values * 1.1).all()
    assert (found <= errors.min(1).values * (1 + 1e-5)).double().mean() > 0.7


def test_normal_values_lose_what_the_digest_says() -> None:
    # adapters.md, 1.9: relative error of a rank-1 component, RTN 0.769 at 2 bits, clipped 0.503
    b, a = rows(4096, 1, 1), rows(4096, 1, 2)
    errors = []
    for rounding in (round_to_nearest, clipped):
        b_hat, a_hat = rounding(b, 2, 128).values(), rounding(a, 2, 128).values()
        lost = 1 - 2 * (b @ b_hat.T) * (a @ a_hat.T) / (b.square().sum() * a.square().sum())
        lost += b_hat.square().sum() * a_hat.square().sum() / (b.square().sum() * a.square().sum())
        errors.append(float(lost) ** 0.5)
    assert errors == pytest.approx([0.769, 0.503], abs=0.03)


@pytest.mark.parametrize("rounding", [round_to_nearest, clipped])
def test_a_group_of_zeros_and_groups_of_one_sign_survive(rounding) -> None:
    w = torch.cat((torch.zeros(1, 32), torch.linspace(1, 1.1, 32)[None], -torch.ones(1, 32)))
    values = rounding(w, 2, 32).values()
    assert not values[0].any()
    torch.testing.assert_close(values[1:], w[1:], rtol=0.11, atol=0)
