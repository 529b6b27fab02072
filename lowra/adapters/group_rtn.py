"""Asymmetric rounding to nearest in groups, as LoRAQuant stores its high part; clipped or not."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lowra.compiler.grids import Coded, Grouped, by_group, in_half

COARSE = torch.arange(100, 15, -5).div(100).tolist()
"""Shares of a group's range that are tried first: 1.00, 0.95, ... 0.20."""
FINE = (-4, -3, -2, -1, 1, 2, 3, 4)
"""Hundredths around the best of these that are tried then."""


def round_to_nearest(rows: Tensor, bits: int, group: int) -> Coded:
    """LoRAQuant's RTN (arXiv 2510.26690; its code, quantization_utils.py), scales in float16.

    Per group: scale = (max - min) / (2^b - 1), zero = -round(min / scale), code =
    clamp(round(w / scale) + zero, 0, 2^b - 1), value = (code - zero) * scale. The range is made to
    include 0, which the code does not do: there a group of one sign gets a zero point out of range
    and loses its values. No other group is changed by it.
    """
    return by_group(rows.float(), group, bits, functools.partial(_rounded, bits=bits))


def clipped(rows: Tensor, bits: int, group: int) -> Coded:
    """RTN with the range of each group cut to the share c in 0.20, 0.21, .. 1.00 that has the least
    squared error: coarse steps, then fine ones around the best. c = 1 is RTN, so no group is worse.

    It stands for the gradient steps of the paper: as released these reach only the largest and the
    smallest value of a group, and so learn where to clip.
    """
    return by_group(rows.float(), group, bits, functools.partial(_searched, bits=bits))


def grid_of(w: Tensor, bits: int, share: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point [rows, groups, 1] of groups [rows, groups, g], before float16."""
    low = w.amin(dim=-1, keepdim=True).clamp(max=0) * share
    high = w.amax(dim=-1, keepdim=True).clamp(min=0) * share
    scale = (high - low) / (2**bits - 1)
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (-torch.round(low / safe)).clamp(0, 2**bits - 1)


def codes_of(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes as floats. A scale of 0 gives the zero point, which stands for 0."""
    safe = torch.where(scale > 0, scale, torch.full_like(scale, torch.inf))
    return torch.round(w / safe).add_(zero).clamp_(0, 2**bits - 1)


def _stored_grid(w: Tensor, bits: int, share: Tensor | float) -> tuple[Tensor, Tensor]:
    scale, zero = grid_of(w, bits, share)
    return in_half(scale), zero


def _rounded(w: Tensor, bits: int, share: Tensor | float = 1.0) -> Grouped:
    scale, zero = _stored_grid(w, bits, share)
    return codes_of(w, scale, zero, bits), scale[..., 0], zero[..., 0]


def _searched(w: Tensor, bits: int) -> Grouped:
    best = torch.ones(*w.shape[:-1], 1)
    least = _loss(w, bits, best)
    for share in COARSE[1:]:
        least, best = _better(w, bits, torch.full_like(best, share), least, best)
    center = best
    for step in FINE:
        share = (center + step / 100).clamp(0.2, 1.0)
        least, best = _better(w, bits, share, least, best)
    return _rounded(w, bits, best)


def _better(
    w: Tensor, bits: int, share: Tensor, least: Tensor, best: Tensor
) -> tuple[Tensor, Tensor]:
    loss = _loss(w, bits, share)
    won = loss < least
    return torch.where(won, loss, least), torch.where(won, share, best)


def _loss(w: Tensor, bits: int, share: Tensor) -> Tensor:
    """Squared error per group, [rows, groups, 1]."""
    scale, zero = _stored_grid(w, bits, share)
    error = codes_of(w, scale, zero, bits).sub_(zero).mul_(scale).sub_(w)
    return error.square_().sum(dim=-1, keepdim=True)
