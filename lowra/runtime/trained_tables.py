"""Codebooks and scales in training: how far each has moved from what was stored.

The codes stay. A level moves in units of the mean distance between the levels of its codebook, a
scale relative to its size, so that one rate suits both, and that of LoRA factors (the idea of
EfficientQAT, arXiv 2407.11062, which trains scales; here levels as well). The model computes with
tables rounded as its file stores them, and gradients pass the rounding as if it were not there:
what is saved is what was trained, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowra.compiler.levels import ascending, spacings
from lowra.compiler.ops import linear
from lowra.compiler.storage import PackedWeight, with_tables

TABLES = ("codebooks", "scales")
"""What of a packed weight may train."""


def is_offset(name: str) -> bool:
    """True for the name of a trained table's offsets in a state dict."""
    return name.endswith(tuple(f".tables.{role}" for role in TABLES))


class TrainedTables(nn.Module):
    """Offsets of one packed weight, zero at first: `codebooks` in distances between levels and
    `scales` relative, flat and in stored order, each a parameter or None. `start` is the weight as
    it was; all layers that share it share these."""

    codebooks: nn.Parameter | None
    scales: nn.Parameter | None

    def __init__(self, start: PackedWeight, roles: Iterable[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.start, self.units = start, spacings(start)
        for role in TABLES:
            table: Tensor | None = getattr(start, role)
            offsets = None
            if role in roles and table is not None:
                offsets = nn.Parameter(torch.zeros(table.shape, dtype=dtype, device=table.device))
            self.register_parameter(role, offsets)
        self._at: list[Tensor] = []
        self._rounded = start

    def moved(self) -> tuple[Tensor, Tensor | None]:
        """Codebooks and scales before they are rounded, with their gradients."""
        codebooks, scales = self.start.codebooks.float(), self.start.scales
        if self.codebooks is not None:
            offset = self.codebooks
            codebooks = codebooks.to(offset) + self.units.to(offset) * offset
            codebooks = ascending(self.start, codebooks)
        if self.scales is not None and scales is not None:
            scales = scales.to(self.scales) * (1 + self.scales).clamp_min(0)
        return codebooks, scales

    def rounded(self) -> PackedWeight:
        """The weight with its tables as they are stored; made anew after they were changed."""
        offsets = [p.detach() for p in (self.codebooks, self.scales) if p is not None]
        # Compared by value: a fused optimiser's step leaves a tensor's version as it was.
        if len(self._at) != len(offsets) or not all(map(_equal, offsets, self._at)):
            # At the start, the file's own grid of scales, which a new one might not meet.
            moved = any(bool(p.any()) for p in offsets)
            self._rounded = self._as_stored() if moved else self.start
            self._at = [p.clone() for p in offsets]
        return self._rounded

    @torch.no_grad()
    def _as_stored(self) -> PackedWeight:
        """Rounded where `start` lies: a model may have gone to another device since."""
        place = self.units.device
        with torch.autocast(place.type, enabled=False):
            tables = (None if t is None else t.to(place) for t in self.moved())
            return with_tables(self.start, *tables)  # pyright: ignore[reportArgumentType]

    def product(self, x: Tensor, packed: tuple[Any, ...]) -> Tensor:
        """y [..., n] = x W' for `packed`, the op arguments of what is `rounded`."""
        codebooks, scales = self.moved()
        return _Product.apply(x, codebooks, scales, packed)  # pyright: ignore

    def dense(self, packed: tuple[Any, ...], dtype: torch.dtype) -> Tensor:
        """W [n, k] in original coordinates, likewise."""
        codebooks, scales = self.moved()
        return _Dense.apply(codebooks, scales, packed, dtype)  # pyright: ignore


class _Product(torch.autograd.Function):
    """A product whose gradients are those of the tables before they were rounded; it keeps x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codebooks: Tensor, scales: Tensor | None, packed: tuple[Any, ...]
    ) -> Tensor:
        ctx.packed, ctx.dtypes = packed, (codebooks.dtype, None if scales is None else scales.dtype)
        ctx.save_for_backward(x)
        return linear(x, packed, None, None)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        grad: Tensor = grads[0]
        (x,) = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        found = torch.ops.lowra.table_gradients(rows, inputs, *ctx.packed)
        back = None
        if ctx.needs_input_grad[0]:
            back = torch.ops.lowra.input_gradient(grad, *ctx.packed)
        return back, *_as(found, ctx.dtypes), None


class _Dense(torch.autograd.Function):
    """A dense weight likewise."""

    @staticmethod
    def forward(
        ctx: Any, codebooks: Tensor, scales: Tensor | None, packed: tuple[Any, ...],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.packed, ctx.dtypes = packed, (codebooks.dtype, None if scales is None else scales.dtype)
        return torch.ops.lowra.dequantize(*packed, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None, None]:
        found = torch.ops.lowra.dequantize_backward(grads[0], *ctx.packed)
        return *_as(found, ctx.dtypes), None, None


def _as(
    found: tuple[Tensor, Tensor], dtypes: tuple[torch.dtype, torch.dtype | None]
) -> tuple[Tensor, Tensor | None]:
    return found[0].to(dtypes[0]), None if dtypes[1] is None else found[1].to(dtypes[1])


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)
