"""Launching kernels: choice of key and grid, arguments by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowra.backends.triton.build import anew_where_broken, compile_options, kernel_of
from lowra.backends.triton.emit import arguments
from lowra.backends.triton.emit_inputs import COLUMNS, span_of
from lowra.backends.triton.keys import Blocks, Key, LinearKey, RotateKey, ShrinkKey, ValuesKey
from lowra.backends.triton.schedule import (
    FEW_TOKENS,
    Choice,
    fused,
    processors,
    tiles_of,
    values_blocks,
)
from lowra.backends.triton.service import failed, refuse_failed
from lowra.backends.triton.targets import Target
from lowra.backends.triton.weight import NAMES, Weight
from lowra.backends.triton.workspace import outside_graphs, workspace
from lowra.compiler.rotation import Rotation, signs


def values(
    weight: Weight, dtype: torch.dtype, target: Target, columns: slice | None = None,
) -> Tensor:  # fmt: skip
    """W [n, columns] in the given order of rows and stored coordinates; `columns` begin at a
    multiple of 256, and of 1280 where there are ternary rows: where tiles of all widths do."""
    columns = columns or slice(0, weight.k)
    size, device = columns.stop - columns.start, weight.codes.device
    out = room("an unpacked weight", (weight.n, size), dtype, device)
    if out.numel() == 0:
        return out
    key = ValuesKey(target, weight.key, NAMES[dtype], values_blocks())
    tiles = weight.form.tiles_of(key.blocks.rows, device)
    given = {
        **weight.tensors(), "tiles": tiles, "out": out, "n": weight.n, "k": weight.k,
        "first_column": columns.start, "last_column": columns.stop,
    }  # fmt: skip
    run(launcher_of(key), (tiles.shape[0], -(-size // 256), 1), given)
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
    choice = choice or fused(
        weight.key, weight.panels, weight.k, m, x.dtype, processors(device), target
    )
    of = dtype_of_b(x.dtype, factors)
    place = ("product", m, x.dtype, device, target.name, rank, of, bias is not None, waits, choice)
    plan = weight.form.plans.get(place)
    if plan is None:
        key, grid = product_key(
            weight, m, NAMES[x.dtype], target, rank, bias is not None, waits, choice, of
        )
        tiles = weight.form.tiles_of(key.blocks.rows, device)
        plan = weight.form.keep(place, (launcher_of(key), grid, tiles))
    launcher, grid, tiles = plan
    given = {
        **weight.tensors(), "x": x, "y": y, "tiles": tiles, "bias": bias,
        "m": m, "n": weight.n, "k": weight.k,
    }  # fmt: skip
    if factors is not None:
        given |= {"hidden": factors[0], "lora_b": factors[1], "scaling": factors[2], "rank": rank}
    if grid[2] > 1:
        given |= room_for_sums("product", grid[0] * grid[1], grid[2], launcher.key.blocks, device)
    run(launcher, grid, given)
    return y


def product_key(
    weight: Weight, m: int, dtype: str, target: Target, rank: int, bias: bool, waits: bool,
    choice: Choice, factor_dtype: str = "",
) -> tuple[LinearKey, tuple[int, int, int]]:  # fmt: skip
    """The kernel of a product with m tokens, and its grid."""
    blocks, parts = choice.blocks, choice.parts
    assert blocks is not None, "an unpacked weight has no kernel that multiplies"
    tiles, token_tiles = tiles_of(weight.panels, m, blocks)
    waits = target.overlaps and (waits if rank else blocks.tokens <= FEW_TOKENS)
    key = LinearKey(
        target, weight.key, dtype, blocks, padded_rank(rank), bias, parts > 1, waits, factor_dtype
    )  # fmt: skip
    return key, (tiles, token_tiles, parts)


def reads_factor(dtype: torch.dtype, target: Target) -> bool:
    """Whether products of few tokens read B in its own dtype: casting it would write and read it
    once more per token. In shared memory it takes that dtype, too; AMD's has no room for float32.
    """
    return dtype in NAMES and target.backend != "hip"


def dtype_of_b(dtype: torch.dtype, factors: tuple[Tensor, Tensor, float] | None) -> str:
    """Of B in (h, B, scaling), as keys name it beside activations of `dtype`."""
    if factors is None or factors[1].dtype == dtype:
        return ""
    return NAMES.get(factors[1].dtype, "")  # any other is cast


def padded_rank(rank: int) -> int:
    """The columns of a product that hold `rank`; 0 for none."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def shrink(x: Tensor, a: Tensor, target: Target) -> Tensor:
    """h = x A' [m, r] in the dtype of x [m, k], for few tokens; what follows may start early."""
    (m, k), rank, device = x.shape, a.shape[0], x.device
    hidden = room("products with A", (m, rank), x.dtype, device)
    launcher, tokens, parts = _shrinking(m, k, rank, x.dtype, a.dtype, target, device)
    given = {"x": x, "lora_a": a, "hidden": hidden, "m": m, "k": k, "rank": rank}
    # Not the room of the product behind it, which may run at the same time.
    given |= room_for_sums("shrink", tokens, parts, launcher.key.blocks, device)
    run(launcher, (1, tokens, parts), given)
    return hidden


@functools.lru_cache(maxsize=4096)
def _shrinking(
    m: int, k: int, rank: int, dtype: torch.dtype, factor_dtype: torch.dtype, target: Target,
    device: torch.device,
) -> tuple[Launcher, int, int]:  # fmt: skip
    """The kernel, tiles of tokens, and parts of the columns."""
    blocks = Blocks(padded_rank(rank), 16, 4, 3)
    runs = -(-k // COLUMNS)
    parts = max(1, min(runs // 2, processors(device) // 2))
    key = ShrinkKey(target, NAMES[dtype], NAMES[factor_dtype], blocks, target.overlaps)
    return launcher_of(key), -(-m // blocks.tokens), parts


def rotated(x: Tensor, rotation: Rotation, target: Target, back: bool = False) -> Tensor:
    """x [m, k] in the coordinates of the weight, or `back`: in float32, then in the dtype of x."""
    if not rotation.active or not x.numel():
        return x
    (m, k), device = x.shape, x.device
    out = room("rotated inputs", (m, k), x.dtype, device)
    signals = target.overlaps and not back and m <= FEW_TOKENS
    launcher, scaled = _rotating(rotation, k, x.dtype, back, signals, target, device)
    grid = (m, -(-k // span_of(rotation.block)), 1)
    run(launcher, grid, {"x": x, "signs": scaled, "out": out, "k": k})
    return out


@functools.lru_cache(maxsize=512)
def _rotating(
    rotation: Rotation, k: int, dtype: torch.dtype, back: bool, signals: bool, target: Target,
    device: torch.device,
) -> tuple[Launcher, Tensor]:  # fmt: skip
    key = RotateKey(target, NAMES[dtype], rotation.block, back, signals)
    return launcher_of(key), _scaled_signs(rotation, k, device)


@functools.cache
def _scaled_signs(rotation: Rotation, k: int, device: torch.device) -> Tensor:
    """Kept for good: captured graphs read them."""
    scaled = (signs(rotation.seed, k) / math.sqrt(rotation.block)).float()
    return outside_graphs(lambda: scaled.to(device), device)


def room(what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, whose error names what there is no room for."""
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        _name_in(error, what, shape, dtype)
        raise


@contextmanager
def noted(what: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[None]:
    """The same for what torch allocates itself."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        _name_in(error, what, shape, dtype)
        raise


def _name_in(
    error: torch.OutOfMemoryError, what: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    size = math.prod(shape) * dtype.itemsize / 2**20
    error.add_note(f"lowra: no room for {what} {list(shape)} of {dtype}, {size:.0f} MiB")


@dataclass
class Launcher:
    """A kernel that is ready to launch."""

    key: Key
    name: str
    kernel: Any
    names: tuple[str, ...]
    options: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def launcher_of(key: Key) -> Launcher:
    """Raises KernelError where its source cannot be loaded, or where it failed before."""
    refuse_failed(key.name)
    try:
        kernel = kernel_of(key)
    except Exception as error:
        raise failed(key, error) from error
    return Launcher(key, key.name, kernel, tuple(arguments(key)), compile_options(key))


def run(launcher: Launcher, grid: tuple[int, int, int], given: dict[str, Any]) -> None:
    """Launch a kernel. One that Triton's cache holds broken is compiled anew, whichever launch
    asks for it first: Triton compiles it for other alignments of its arguments too. Raises
    KernelError where that fails, or failed before."""
    kernel, options = launcher.kernel, launcher.options
    values_ = [given[name] for name in launcher.names]
    if not launcher.key.target.backend:
        kernel[grid](*values_, **options)
        return
    refuse_failed(launcher.name)
    try:
        with _current(values_[0].device):
            anew_where_broken(lambda: kernel[grid](*values_, **options), kernel)
    except Exception as error:
        raise failed(launcher.key, error) from error


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever the tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


_HERE = nullcontext()


def room_for_sums(
    what: str, places: int, parts: int, blocks: Blocks, device: torch.device
) -> dict[str, Tensor]:
    """Of `parts` programs at each of `places`: arguments of kernels that split their columns."""
    sums, counters = workspace(what, places, places * parts * blocks.rows * blocks.tokens, device)
    return {"partial": sums, "counters": counters}
