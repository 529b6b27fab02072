"""Symmetric grids: a fixed table of levels, two signs at 1 bit, times a fitted scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowra.compiler.grids import Coded, Grouped, by_group, in_half, levels
from lowra.compiler.storage import ROW_SCALES

STARTS = torch.logspace(-0.5, 0.5, 21, dtype=torch.float64)
"""Scales that fitting starts from, in root mean squares of the group: 0.32 to 3.2."""
TURNS = 3


def signed(rows: Tensor, group: int) -> Coded:
    """1 bit: sign(w) * mean|w| per group, the least-squares scale (LoRAQuant's low part; XNOR-Net,
    arXiv 1603.05279). A value of 0 has no code of its own and counts as positive."""
    return by_group(rows.float(), group, 1, _signed)


def _signed(w: Tensor) -> Grouped:
    return (w >= 0).to(torch.uint8), in_half(w.abs().mean(dim=-1)), None


@dataclass(frozen=True)
class Fitting:
    """Rows [rows, length] ready to be fitted at any width: sorted once for all of them.

    A width's codes are those nearest under the least-squares scale <|w|, l> / <l, l> of their
    levels l, found by turns from the best of 21 starts. What is stored is |w|^2 / <|w|, l>: with
    it <q, w> = <w, w>. Least squares makes every vector shorter by the part that it loses, and so
    the whole adapter weaker, which costs a model more than noise does (decision 19). With |w|
    sorted and summed up, a scale is judged by a few look-ups, whatever the length of the group.
    """

    rows: Tensor
    group: int

    def losses(self, width: float) -> Tensor:
        """float64 [rows]: the squared error of every row at `width`."""
        return sum((block.fit(width).loss.sum(dim=1) for block in self._blocks), torch.zeros(()))

    def coded(self, width: float) -> Coded:
        """The rows on the grid of `width`."""
        blocks = iter(self._blocks)  # in the order in which by_group cuts

        def quantize(w: Tensor) -> Grouped:
            fit = next(blocks).fit(width)
            return _codes(w, fit.nearest[..., None], levels(width)), fit.scale, None

        return by_group(self.rows.float(), self.group, width, quantize)

    @cached_property
    def _blocks(self) -> tuple[_Block, ...]:
        count, length = self.rows.shape
        size = length if self.group == ROW_SCALES else min(self.group, length)
        whole = length // size * size
        parts = [self.rows[:, :whole].reshape(count, -1, size)]
        if whole < length:
            parts.append(self.rows[:, whole:].reshape(count, 1, -1))
        # numpy's sort of float32 is vectorised, torch's carries indices along
        sorted_ = (np.sort(part.float().abs().numpy(), axis=-1) for part in parts)
        return tuple(_Block(torch.from_numpy(magnitudes)) for magnitudes in sorted_)


class _Fit(NamedTuple):
    """Of groups, [rows, groups] each: the scale that codes are nearest under, the one to be stored
    (float32 as float16 holds it), and the squared error."""

    nearest: Tensor
    scale: Tensor
    loss: Tensor


@dataclass(frozen=True)
class _Block:
    """|w| of groups of one size, float32 [rows, groups, g], ascending."""

    magnitudes: Tensor

    @cached_property
    def sums(self) -> Tensor:
        """float64 [rows, groups, g + 1]: sums of the smallest 0, 1, .. g magnitudes."""
        total = self.magnitudes.double().cumsum(dim=-1)
        return torch.cat((torch.zeros_like(total[..., :1]), total), dim=-1)

    @cached_property
    def energy(self) -> Tensor:
        return self.magnitudes.double().square().sum(dim=-1)

    @cached_property
    def _fits(self) -> dict[float, _Fit]:
        return {}

    def fit(self, width: float) -> _Fit:
        if width not in self._fits:
            self._fits[width] = self._fit(width)
        return self._fits[width]

    def _fit(self, width: float) -> _Fit:
        rms = (self.energy / self.magnitudes.shape[-1]).sqrt()
        scale = rms[..., None] * STARTS if width != 1 else rms[..., None]
        for _ in range(TURNS):
            dot, square = self._levels(scale, width)
            scale = torch.where(square > 0, dot / square.clamp(min=1), 0.0)
            best = (dot * scale).argmax(dim=-1, keepdim=True)
            scale = scale.gather(-1, best)
        nearest = scale.float()
        dot, square = (x[..., 0] for x in self._levels(nearest.double(), width))
        stored = in_half(torch.where(dot > 0, self.energy / dot.clamp(min=1e-300), 0.0).float())
        loss = self.energy - 2 * stored * dot + stored.double().square() * square
        return _Fit(nearest[..., 0], stored, loss.clamp(min=0))

    def _levels(self, scale: Tensor, width: float) -> tuple[Tensor, Tensor]:
        """<|w|, l> and <l, l> for the levels l nearest to |w| / scale; shapes as scale's."""
        table = levels(width).double()
        upper = table[table >= 0]
        middles = (upper[1:] + upper[:-1]) / 2
        size = self.magnitudes.shape[-1]
        if not middles.numel():  # 1 bit
            return self.sums[..., -1:] * upper, torch.full_like(scale, size) * upper.square()
        shape = (*scale.shape, middles.numel())
        bounds = (scale[..., None] * middles).float().flatten(-2).contiguous()
        inner = torch.searchsorted(self.magnitudes, bounds).reshape(shape)
        edges = functional.pad(functional.pad(inner, (1, 0)), (0, 1), value=size)
        sums = self.sums.gather(-1, edges.flatten(-2)).reshape(edges.shape).diff(dim=-1)
        return sums @ upper, edges.diff(dim=-1).double() @ upper.square()


def _codes(w: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """uint8: the index of the level nearest to w / scale. A scale of 0 gives the middle."""
    scaled = w / torch.where(scale > 0, scale, torch.full_like(scale, torch.inf))
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for middle in ((table[1:] + table[:-1]) / 2).tolist():
        codes += scaled > middle
    return codes
