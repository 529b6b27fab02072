"""Plain-torch meaning of the ops on adapters in pages (lowra/compiler/adapter_ops.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.adapter_ops import require_rows
from lowra.compiler.adapter_pages import CORE, DIAGONAL, OUT, POST, A, B, read_chunk
from lowra.compiler.ops import LIBRARY


@dataclass(frozen=True)
class _Adapter:
    """The parts of one adapter at one linear, in the dtype of the arithmetic."""

    a: Tensor  # [r, k]
    b: Tensor  # [r', n], B transposed
    core: Tensor | None  # [r', r]
    diagonal: Tensor | None  # [r]
    out: Tensor | None  # [n]
    post: Tensor | None  # [n]

    def hidden(self, x: Tensor) -> Tensor:
        """C A x of rows x [m, k]: [m, r']."""
        v = x @ self.a.T
        if self.diagonal is not None:
            v = v * self.diagonal
        return v if self.core is None else v @ self.core.T

    def delta(self, x: Tensor) -> Tensor:
        """o * B C A x: [m, n]."""
        y = self.hidden(x) @ self.b
        return y if self.out is None else y * self.out

    def delta_transposed(self, grad: Tensor) -> Tensor:
        """The gradient of `delta` to x: [m, n] -> [m, k]."""
        v = (grad if self.out is None else grad * self.out) @ self.b.T
        v = v if self.core is None else v @ self.core
        return (v if self.diagonal is None else v * self.diagonal) @ self.a


def _read(pages: Tensor, lines: list[list[int]], k: int, n: int, dtype: torch.dtype) -> _Adapter:
    parts: dict[int, list[Tensor]] = {}
    for line in sorted(lines, key=lambda line: line[:2]):
        parts.setdefault(line[0], []).append(read_chunk(pages, line).to(dtype))
    whole = {role: torch.cat(found) for role, found in parts.items()}
    row = {role: whole[role][0] for role in (DIAGONAL, OUT, POST) if role in whole}
    out, post = (None if row.get(role) is None else row[role][:n] for role in (OUT, POST))
    a, b = whole[A][:, :k], whole[B][:, :n]
    return _Adapter(a, b, whole.get(CORE), row.get(DIAGONAL), out, post)


def _entries(
    pages: Tensor, chunks: Tensor, bounds: Tensor, slots: Tensor, k: int, n: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, Tensor, _Adapter]]:
    """(place j, slot, its tokens, its parts): each adapter once per place that it stands in."""
    lines, edges = chunks.tolist(), bounds.tolist()
    for slot in torch.unique(slots[slots >= 0]).tolist():
        mine = lines[edges[slot] : edges[slot + 1]]
        if not mine:  # this adapter leaves this linear alone
            continue
        adapter = _read(pages, mine, k, n, dtype)
        for place in range(slots.shape[1]):
            tokens = (slots[:, place] == slot).nonzero()[:, 0]
            if len(tokens):
                yield place, slot, tokens, adapter


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def apply_adapters(
    y: Tensor, x: Tensor, pages: Tensor, chunks: Tensor, bounds: Tensor, scalings: Tensor,
    slots: Tensor, weights: Tensor, rank: int,
) -> Tensor:  # fmt: skip
    """y + sum over j of w_j (d_j * (y + s_j o_j * B_j C_j A_j x) - y)."""
    require_rows(y, x, slots, weights)
    working = _working(y.dtype)
    base, inputs, sums = y.to(working), x.to(working), y.to(working, copy=True)
    share, scale = weights.to(working), scalings.to(working)
    found = _entries(pages, chunks, bounds, slots, x.shape[1], y.shape[1], working)
    for place, slot, tokens, adapter in found:
        change = scale[slot] * adapter.delta(inputs[tokens])
        if adapter.post is not None:
            change = adapter.post * (base[tokens] + change) - base[tokens]
        sums.index_add_(0, tokens, share[tokens, place, None] * change)
    return sums.to(y.dtype)


def apply_adapters_backward(
    grad: Tensor, y: Tensor, x: Tensor, pages: Tensor, chunks: Tensor, bounds: Tensor,
    scalings: Tensor, slots: Tensor, weights: Tensor, rank: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to y, x and weights of `apply_adapters`."""
    working = _working(y.dtype)
    base, inputs, flow = y.to(working), x.to(working), grad.to(working)
    share, scale = weights.to(working), scalings.to(working)
    to_y, to_x, to_share = flow.clone(), torch.zeros_like(inputs), torch.zeros_like(share)
    found = _entries(pages, chunks, bounds, slots, x.shape[1], y.shape[1], working)
    for place, slot, tokens, adapter in found:
        g, change = flow[tokens], scale[slot] * adapter.delta(inputs[tokens])
        weight, after = share[tokens, place, None], g
        if adapter.post is not None:
            change = adapter.post * (base[tokens] + change) - base[tokens]
            after = g * adapter.post
            to_y.index_add_(0, tokens, weight * (after - g))
        to_share[tokens, place] += (g * change).sum(dim=1)
        to_x.index_add_(0, tokens, weight * scale[slot] * adapter.delta_transposed(after))
    return to_y.to(y.dtype), to_x.to(x.dtype), to_share.to(weights.dtype)


for _kernel in (apply_adapters, apply_adapters_backward):
    torch.library.impl(
        f"lowra::{_kernel.__name__}", "CompositeExplicitAutograd", _kernel, lib=LIBRARY
    )
