"""Trainable stand-ins for packed weights: a latent value per code, levels and scales as offsets.

Forward, every latent is rounded to the nearest level of its row's codebook and multiplied by the
scale. Backward, the gradient passes the rounding as if it were not there (straight-through, as in
AutoRound, arXiv 2309.05516, and EfficientQAT, arXiv 2407.11062, here towards free codebooks).

Trellis codes have no latents and stay: a latent that crosses a threshold sends 64 rows on other
paths, which undoes more than it mends. Their levels and scales train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.compact import Compact, round_levels
from lowra.compiler.packing import FORMATS
from lowra.compiler.storage import PackedWeight
from lowra.passes.rounding.feedback import scale_index
from lowra.passes.rounding.panels import Panel, put_together, take_apart

FEW = 8
"""Up to here, a comparison per threshold is faster than a binary search."""
MARGIN = 0.01
"""How far from a threshold a latent starts at least, as part of the distance between levels."""


class _Look(torch.autograd.Function):
    """Latents [rows, k] in units of scale -> level of the nearest code times scale; or, for codes
    int32 [rows, k] that stay, level of the code times scale."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, levels: Tensor, factors: Tensor) -> Tensor:
        codes = nearest(latents, levels) if latents.is_floating_point() else latents
        picked = look_up(codes, levels)
        ctx.save_for_backward(codes, picked, factors)
        ctx.shape = levels.shape
        return picked * factors

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        codes, picked, factors = ctx.saved_tensors
        grad: Tensor = grads[0]
        scaled = grad * factors
        levels = level_grads(codes, scaled, ctx.shape) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[2]:
            return scaled, levels, None
        products = grad * picked
        return scaled, levels, products.sum(1, keepdim=True) if factors.shape[1] == 1 else products


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """int32 codes [rows, k] of the nearest of ascending levels, [L] shared or [rows, L]."""
    thresholds = ((levels[..., 1:] + levels[..., :-1]) / 2).contiguous()
    if levels.dim() == 1 and len(thresholds) < FEW:
        codes = torch.zeros(values.shape, dtype=torch.int32)
        for threshold in thresholds:
            codes += values > threshold
        return codes
    if levels.dim() == 1:
        return torch.bucketize(values, thresholds, out_int32=True)
    return torch.searchsorted(thresholds, values.contiguous(), out_int32=True)


def look_up(codes: Tensor, levels: Tensor) -> Tensor:
    """Level of each code, float32 [rows, k]."""
    if levels.dim() == 1:
        return levels.index_select(0, codes.reshape(-1)).view(codes.shape)
    return levels.gather(1, codes.long())


def level_grads(codes: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """Gradients of levels of `shape`, [L] shared or [rows, L]: those of the values in units of
    scale, float32 [rows, k], summed by code."""
    if len(shape) == 2:
        return torch.zeros(shape).scatter_add_(1, codes.long(), grad)
    return torch.bincount(codes.reshape(-1), grad.reshape(-1), minlength=shape[0]).float()


@dataclass(frozen=True)
class LatentPanel:
    """One panel in training. `start` is as stored; levels and scales move by `unit * offset`.
    latents: float32 [rows, k], or the codes int32 of a trellis."""

    start: Panel
    group: int
    compact: Compact
    latents: Tensor
    spacing: Tensor
    level_offset: Tensor
    scale_offset: Tensor | None

    def levels(self) -> Tensor:
        moved = self.start.levels + self.spacing * self.level_offset
        return torch.cummax(moved, -1).values

    def scales(self) -> Tensor | None:
        if self.start.scales is None or self.scale_offset is None:
            return None
        return self.start.scales * (1 + self.scale_offset)

    def values(self) -> Tensor:
        """float32 [rows, k]."""
        scales = self.scales()
        factors = torch.ones(1, 1) if scales is None else scales
        if scales is not None and scales.shape[1] > 1:
            factors = scales[:, scale_index(self.latents.shape[1], self.group)]
        return _Look.apply(self.latents, self.levels(), factors)  # pyright: ignore

    def stored(self) -> Panel:
        """The panel with its levels rounded as stored, and the codes nearest to those.

        Scales are rounded where the whole weight is put together: codes do not depend on them.
        """
        levels = round_levels(self.levels().detach(), self.compact)
        scales, codes = self.scales(), self.start.codes
        if self.latents.is_floating_point():
            codes = nearest(self.latents.detach(), levels)
        scales = None if scales is None else scales.detach()
        return replace(self.start, levels=levels, codes=codes, scales=scales)


class LatentWeight:
    """One site in training."""

    def __init__(self, packed: PackedWeight, wanted: Tensor) -> None:
        """`wanted` float32 [n, k] in rotated coordinates: what each value would like to be."""
        self.packed = packed
        self.panels = [
            _latent_panel(panel, wanted[panel.index], packed) for panel in take_apart(packed)
        ]
        order = torch.cat([panel.start.index for panel in self.panels])
        self._back = torch.argsort(order)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[n, k] in rotated coordinates, differentiable."""
        rows = torch.cat([panel.values().to(dtype) for panel in self.panels])
        return rows.index_select(0, self._back)

    def latents(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every latent tensor with the distance between levels, [1] or [rows, 1]."""
        for panel in self.panels:
            if panel.latents.is_floating_point():
                yield panel.latents, panel.spacing

    def offsets(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of levels, those of scales."""
        scales = [p.scale_offset for p in self.panels if p.scale_offset is not None]
        return [panel.level_offset for panel in self.panels], scales

    def stored(self) -> PackedWeight:
        return put_together([panel.stored() for panel in self.panels], self.packed)


def _latent_panel(start: Panel, wanted: Tensor, packed: PackedWeight) -> LatentPanel:
    levels = start.levels
    spacing = (levels[..., -1:] - levels[..., :1]) / (levels.shape[-1] - 1)
    unit = wanted
    if start.scales is not None:
        scales = torch.where(start.scales == 0, torch.ones(()), start.scales)
        unit = wanted / scales[:, scale_index(wanted.shape[1], packed.group)]
    latents = start.codes
    if not FORMATS[start.width].trellis:
        low, high = _bins(start.codes, levels, spacing)
        latents = torch.minimum(torch.maximum(unit, low), high).requires_grad_()
    offset = None if start.scales is None else torch.zeros_like(start.scales).requires_grad_()
    return LatentPanel(
        start, packed.group, packed.compact, latents, spacing,
        torch.zeros_like(levels).requires_grad_(), offset,
    )  # fmt: skip


def _bins(codes: Tensor, levels: Tensor, spacing: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of each code's bin, a little inside; the outer bins reach half a spacing out."""
    middle = (levels[..., 1:] + levels[..., :-1]) / 2
    low = torch.cat((levels[..., :1] - spacing / 2, middle), -1)
    high = torch.cat((middle, levels[..., -1:] + spacing / 2), -1)
    inside = MARGIN * (high - low)
    return look_up(codes, low + inside), look_up(codes, high - inside)


def wanted_values(weight: Tensor, stored: Tensor, gram: Tensor) -> Tensor:
    """What coordinate descent would like each value to be, given all others: with E = W - Q,
    q + (E G) / diag(G); all float32 [n, k] in rotated coordinates."""
    slope = (weight - stored) @ gram
    return stored + slope / gram.diagonal().clamp_min(1e-12)
