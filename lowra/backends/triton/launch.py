"""Launching kernels: choice of key and grid, arguments by name."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lowra.backends.triton.build import anew_where_broken, compile_options, kernel_of
from lowra.backends.triton.emit import arguments
from lowra.backends.triton.emit_inputs import COLUMNS, span_of
from lowra.backends.triton.keys import Blocks, Key, LinearKey, RotateKey, ShrinkKey, ValuesKey
from lowra.backends.triton.schedule import Choice, fused, processors, tiles_of, values_blocks
from lowra.backends.triton.targets import Target
from lowra.backends.triton.weight import NAMES, Weight, descriptors
from lowra.compiler.rotation import Rotation, signs


def values(
    weight: Weight, dtype: torch.dtype, target: Target, columns: slice | None = None,
) -> Tensor:  # fmt: skip
    """W [n, columns] in the given order of rows and stored coordinates; `columns` begin at a
    multiple of 1280, where tiles of both lengths do."""
    columns = columns or slice(0, weight.k)
    size, device = columns.stop - columns.start, weight.codes.device
    out = room("an unpacked weight", (weight.n, size), dtype, device)
    if out.numel() == 0:
        return out
    key = ValuesKey(target, weight.key, NAMES[dtype], values_blocks())
    tiles = descriptors(weight.panels, weight.k, weight.key.own, key.blocks.rows, device)
    given = {
        **weight.tensors(), "tiles": tiles, "out": out, "n": weight.n, "k": weight.k,
        "first_column": columns.start, "last_column": columns.stop,
    }  # fmt: skip
    run(key, (tiles.shape[0], -(-size // 256), 1), given)
    return out


def product(
    x: Tensor, weight: Weight, target: Target, bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None = None, waits: bool = False,
    choice: Choice | None = None,
) -> Tensor:  # fmt: skip
    """y [m, n] of x [m, k], contiguous and in stored coordinates; factors are (h, B, scaling) with
    h = x A' [m, r], which with `waits` the kernel ahead of this one makes. choice: a fused one."""
    m, device = x.shape[0], x.device
    y = room("a product", (m, weight.n), x.dtype, device)
    if y.numel() == 0:
        return y
    rank = 0 if factors is None else factors[0].shape[1]
    choice = choice or fused(weight.panels, weight.k, m, processors(device), target)
    key, grid = product_key(
        weight, m, NAMES[x.dtype], target, rank, bias is not None, waits, choice
    )
    tiles = descriptors(weight.panels, weight.k, weight.key.own, key.blocks.rows, device)
    given = {
        **weight.tensors(), "x": x, "y": y, "tiles": tiles, "bias": bias,
        "m": m, "n": weight.n, "k": weight.k,
    }  # fmt: skip
    if factors is not None:
        given |= {"hidden": factors[0], "lora_b": factors[1], "scaling": factors[2], "rank": rank}
    if key.split:
        given |= _workspace("product", grid[0] * grid[1], grid[2], key.blocks, device)
    run(key, grid, given)
    return y


def product_key(
    weight: Weight, m: int, dtype: str, target: Target, rank: int, bias: bool, waits: bool,
    choice: Choice,
) -> tuple[LinearKey, tuple[int, int, int]]:  # fmt: skip
    """The kernel of a product with m tokens, and its grid."""
    blocks, parts = choice.blocks, choice.parts
    assert blocks is not None, "an unpacked weight has no kernel that multiplies"
    tiles, token_tiles = tiles_of(weight.panels, m, blocks)
    waits = waits and target.overlaps and rank > 0
    key = LinearKey(target, weight.key, dtype, blocks, padded_rank(rank), bias, parts > 1, waits)
    return key, (tiles, token_tiles, parts)


def padded_rank(rank: int) -> int:
    """The columns of a product that hold `rank`; 0 for none."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def shrink(x: Tensor, a: Tensor, target: Target) -> Tensor:
    """h = x A' [m, r] in the dtype of x [m, k], for few tokens; what follows may start early."""
    (m, k), rank, device = x.shape, a.shape[0], x.device
    hidden = torch.empty(m, rank, dtype=x.dtype, device=device)
    blocks = Blocks(padded_rank(rank), 16, 4, 3)
    tokens, runs = -(-m // blocks.tokens), -(-k // COLUMNS)
    parts = max(1, min(runs // 2, processors(device) // 2))
    key = ShrinkKey(target, NAMES[x.dtype], NAMES[a.dtype], blocks, target.overlaps)
    given = {"x": x, "lora_a": a, "hidden": hidden, "m": m, "k": k, "rank": rank}
    # Not the room of the product behind it, which may run at the same time.
    given |= _workspace("shrink", tokens, parts, blocks, device)
    run(key, (1, tokens, parts), given)
    return hidden


def rotated(x: Tensor, rotation: Rotation, target: Target, back: bool = False) -> Tensor:
    """x [m, k] in the coordinates of the weight, or `back`: in float32, then in the dtype of x."""
    (m, k), device = x.shape, x.device
    out = room("rotated inputs", (m, k), x.dtype, device)
    if not rotation.active or not out.numel():
        return x
    key = RotateKey(target, NAMES[x.dtype], rotation.block, back)
    scaled = _scaled_signs(rotation, k, device)
    span = span_of(rotation.block)
    run(key, (m, -(-k // span), 1), {"x": x, "signs": scaled, "out": out, "k": k})
    return out


@functools.lru_cache(maxsize=512)
def _scaled_signs(rotation: Rotation, k: int, device: torch.device) -> Tensor:
    return (signs(rotation.seed, k) / math.sqrt(rotation.block)).float().to(device)


def room(what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, whose error names what there is no room for."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        size = math.prod(shape) * dtype.itemsize / 2**20
        error.add_note(f"lowra: no room for {what} {list(shape)} of {dtype}, {size:.0f} MiB")
        raise


def run(key: Key, grid: tuple[int, int, int], given: dict[str, Any]) -> None:
    """Launch the kernel of `key`. One that Triton's cache holds broken is compiled anew."""
    kernel = kernel_of(key)
    options = compile_options(key)
    values_ = [given[name] for name in arguments(key)]
    if key in _ran or not key.target.backend:
        kernel[grid](*values_, **options)
        return
    anew_where_broken(lambda: kernel[grid](*values_, **options))
    _ran.add(key)


_ran: set[Key] = set()
"""Keys that have been launched: from then on an error is no fault of a cache."""


_workspaces: dict[tuple[str, torch.device, int], tuple[Tensor, Tensor]] = {}


def _workspace(
    what: str, places: int, parts: int, blocks: Blocks, device: torch.device
) -> dict[str, Tensor]:
    """Room for sums of parts, and counters that are zero between launches; one per stream, since
    launches on one stream follow each other. Kept: a captured graph goes on using it."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    size = places * parts * blocks.rows * blocks.tokens
    sums, counters = _workspaces.get((what, device, stream), (None, None))
    if sums is None or counters is None or sums.numel() < size or counters.numel() < places:
        sums = room("sums of parts", (size,), torch.float32, device)
        counters = torch.zeros(max(places, 4096), dtype=torch.int32, device=device)
        _kept.append((sums, counters))
        _workspaces[what, device, stream] = sums, counters
    return {"partial": sums, "counters": counters}


_kept: list[tuple[Tensor, Tensor]] = []
