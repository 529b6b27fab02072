"""The kernels of `lowra::apply_adapters`, for CUDA and ROCm devices."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lowra.backends.reference import adapters as reference
from lowra.backends.triton import launch, service
from lowra.backends.triton.emit_adapters import COLUMNS, RANKS
from lowra.backends.triton.keys import Blocks, ExpandKey, GatherKey
from lowra.backends.triton.schedule import processors
from lowra.backends.triton.targets import Target
from lowra.backends.triton.weight import NAMES
from lowra.backends.triton.workspace import outside_graphs
from lowra.compiler.adapter_ops import require_rows
from lowra.compiler.grids import level_tables
from lowra.compiler.ops import LIBRARY

FEW_TOKENS = 64
SHORTEST_PART = 2 * COLUMNS
MOST_PARTS = 16


def apply_adapters(
    y: Tensor, x: Tensor, pages: Tensor, chunks: Tensor, bounds: Tensor, scalings: Tensor,
    slots: Tensor, weights: Tensor, rank: int,
) -> Tensor:  # fmt: skip
    """y + sum over j of w_j (f_j(y) - y); see the reference. Sums are float32, factors TF32 where
    y is in half precision. Chunks are taken as a pool made them: a look at them would wait for the
    device. Raises AdapterError for slots and weights of other rows than x."""
    require_rows(y, x, slots, weights)
    tables = (pages, chunks, bounds, scalings, slots, weights)

    def plain() -> Tensor:
        return reference.apply_adapters(y, x, *tables, rank)

    if y.dtype not in NAMES:
        return plain()
    return service.serve(y.device, lambda target: changed(y, x, tables, rank, target), plain)


def changed(y: Tensor, x: Tensor, tables: tuple[Tensor, ...], rank: int, target: Target) -> Tensor:
    """By the kernels: one makes A x of every token, and one per place adds what follows. No number
    of theirs depends on what a tensor holds, so a graph of them serves other adapters as well."""
    pages, chunks, bounds, scalings, slots, weights = tables
    (m, n), k, places = y.shape, x.shape[1], slots.shape[1]
    count = len(scalings)
    out = y.to(torch.float32 if places > 1 else y.dtype, copy=True).contiguous()
    if not (out.numel() and count and len(chunks) and places and rank):
        return out.to(y.dtype)
    x, y = x.to(y.dtype).contiguous(), y.contiguous()
    blocks = Blocks(RANKS, tokens_of(m, y.dtype), 8, 2)
    tiles = -(-m // blocks.tokens)
    parts = _parts(k, count * tiles, processors(x.device))
    hidden = launch.room("products with A", (parts, m, places, rank), torch.float32, x.device)
    given = _memory(pages) | {
        "tables": _levels(x.device), "chunks": chunks.int().contiguous(),
        "bounds": bounds.int().contiguous(), "scalings": scalings.float().contiguous(),
        "slots": slots.int().contiguous(), "weights": weights.float().contiguous(),
        "x": x, "y": y, "out": out, "hidden": hidden, "m": m, "n": n, "k": k, "places": places,
        "rank": rank, "parts": parts,
    }  # fmt: skip
    key = GatherKey(target, NAMES[x.dtype], blocks)
    launch.run(launch.launcher_of(key), (count, tiles, parts), given)
    expand = launch.launcher_of(ExpandKey(target, NAMES[y.dtype], NAMES[out.dtype], blocks))
    for place in range(places):
        launch.run(expand, (count, tiles, -(-n // COLUMNS)), {**given, "place": place})
    return out.to(y.dtype)


def tokens_of(m: int, dtype: torch.dtype) -> int:
    """Tokens of a program: as many as registers hold on every target. Not timed."""
    return 16 if m <= FEW_TOKENS or dtype == torch.float32 else 32


def _parts(k: int, programs: int, processors: int) -> int:
    """Programs that share the columns of x, so that most processors have one."""
    return max(1, min(-(-processors // programs), -(-k // SHORTEST_PART), MOST_PARTS))


def _memory(pages: Tensor) -> dict[str, Any]:
    """The pages as each type that lies in them."""
    views = {"page_bytes": torch.uint8, "halves": torch.float16, "brains": torch.bfloat16}
    views["floats"] = torch.float32
    return {"pages": pages, **{name: pages.view(dtype) for name, dtype in views.items()}}


@functools.lru_cache(maxsize=8)
def _levels(device: torch.device) -> Tensor:
    return outside_graphs(lambda: level_tables().to(device), device)


torch.library.impl("lowra::apply_adapters", "CUDA", apply_adapters, lib=LIBRARY)
