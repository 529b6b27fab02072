"""Launching the emitted product kernels: packed weights and activations as C structures."""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowra.backends.cpu.emit import (
    ELEMENTS,
    LOOKED_UP,
    VALUES,
    KernelKey,
    emit,
    key_of,
    looks_up,
)
from lowra.backends.cpu.tiers import Tier, best_tier
from lowra.backends.cpu.toolchain import built
from lowra.compiler.packing import levels_of, row_words
from lowra.compiler.rotation import Rotation, signs
from lowra.compiler.storage import scale_groups

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_PANELS = 8


class _Weight(ctypes.Structure):
    """`Weight` of sources/product/weight.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in
          ("codes", "codebooks", "scales", "order", "signs", "derived")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group", "groups", "block", "panels")),
        ("widths", ctypes.c_int64 * MOST_PANELS), ("rows", ctypes.c_int64 * MOST_PANELS),
        ("shared", ctypes.c_int32), ("ready", ctypes.c_int32),
    ]  # fmt: skip


class _Extras(ctypes.Structure):
    """`Extras` of sources/product/weight.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("bias", "a", "b")), ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("bias_kind", "factor_kind")),
    ]  # fmt: skip


@dataclass
class Prepared:
    """A packed weight as a kernel takes it, and the tensors that its pointers lead into."""

    weight: _Weight
    address: int
    key: tuple[Any, ...]
    codes: weakref.ref[Tensor]
    kept: tuple[Tensor | None, ...]
    kernel: Any
    name: str
    rotation: Rotation
    looked_up: bool
    """Whether every row is multiplied in bytes or halves."""
    extras: tuple[tuple[Any, ...], int, Any] | None = None
    """Of the last call: what it was given, the address of its structure, what that leads into."""


_prepared: dict[tuple[int, str, str], Prepared] = {}


def prepared(
    packed: tuple[Any, ...], activations: str, tier: Tier | None = None
) -> Prepared | None:
    """The weight of the packed op arguments, ready for a kernel that reads `activations`, or for
    the one that unpacks it (`VALUES`); None where no kernel takes it.

    Kept for as long as its codes live; made anew when one of its tensors is another.
    """
    codes, codebooks, scales, order, *layout = packed
    tier = tier or best_tier()
    place = (id(codes), tier.name, activations)
    found = _prepared.get(place)
    key = (
        codes.data_ptr(), codebooks.data_ptr(), order.data_ptr(),
        0 if scales is None else scales.data_ptr(), *layout,
    )  # fmt: skip
    if found is not None and found.codes() is codes and found.key == key:
        return found
    made = _prepare(packed, activations, tier, key)
    if made is not None:
        _prepared[place] = made
        weakref.finalize(codes, _prepared.pop, place, None).atexit = False
    return made


def _prepare(
    packed: tuple[Any, ...], activations: str, tier: Tier, key: tuple[Any, ...]
) -> Prepared | None:
    codes, codebooks, scales, order, panels, k, group, seed, block = packed
    if not _plain(codes, codebooks, scales, order, panels):
        return None
    shared = check_sizes(*packed[:7])
    widths, rows = panels[0::2], panels[1::2]
    kernel_key = key_of(tier, activations, set(widths), group > 0)
    kernel = _kernel(kernel_key)
    if kernel is None:
        return None
    turn = None if block == 1 else (signs(seed, k) / math.sqrt(block)).float()
    derived = torch.empty(derived_bytes(kernel_key, panels, shared), dtype=torch.uint8)
    weight = _Weight(
        codes.data_ptr(), codebooks.data_ptr(), None if scales is None else scales.data_ptr(),
        order.data_ptr(), None if turn is None else turn.data_ptr(), derived.data_ptr(),
        order.shape[0], k, max(group, 0), scale_groups(k, group) if scales is not None else 1,
        block, len(rows), (ctypes.c_int64 * MOST_PANELS)(*widths),
        (ctypes.c_int64 * MOST_PANELS)(*rows), int(shared), 0,
    )  # fmt: skip
    kept = (codebooks, scales, order, turn, derived)
    return Prepared(
        weight, ctypes.addressof(weight), (*key[:4], list(panels), *key[5:]), weakref.ref(codes),
        kept, kernel, kernel_key.name, Rotation(seed, block), looks_up(kernel_key, set(widths)),
    )  # fmt: skip


def derived_bytes(key: KernelKey, panels: list[int], shared: bool) -> int:
    """Room for what sources/product/tables.h keeps: per table its step and offset, its elements
    where codes are looked up, and the float16 values they were made of."""
    element = ELEMENTS[key.activations][0]
    room = 0
    for width, count in zip(panels[0::2], panels[1::2], strict=True):
        levels = levels_of(width)
        looked_up = element * max(levels, 2 * (levels // 2 + levels % 2)) if levels <= 16 else 0
        room += (1 if shared else count) * (8 + looked_up + 2 * levels)
    return room


def _plain(
    codes: Tensor, codebooks: Tensor, scales: Tensor | None, order: Tensor, panels: list[int]
) -> bool:
    """Whether a kernel can read these tensors where they lie."""
    given = [(codes, torch.int32), (codebooks, torch.float16), (order, torch.int32)]
    if scales is not None:
        given.append((scales, torch.float16))
    if len(panels) > 2 * MOST_PANELS or not {*panels[0::2]} <= {*LOOKED_UP, 8}:
        return False
    return all(tensor.dtype == dtype and tensor.is_contiguous() for tensor, dtype in given)


def check_sizes(
    words: Tensor, tables: Tensor, scales: Tensor | None, order: Tensor,
    panels: list[int], k: int, group: int,
) -> bool:  # fmt: skip
    """Whether codebooks are shared. Raises ValueError where a size is not what a kernel reads."""
    pairs = list(zip(panels[0::2], panels[1::2], strict=True))
    rows = sum(count for _, count in pairs)
    shared = tables.numel() == sum(levels_of(id) for id, _ in pairs)
    sizes = [
        ("code words", words.numel(), sum(count * row_words(k, id) for id, count in pairs)),
        ("row numbers", order.numel(), rows),
    ]
    if not shared:
        values = sum(count * levels_of(id) for id, count in pairs)
        sizes.append(("codebook values", tables.numel(), values))
    if scales is not None:
        sizes.append(("scales", scales.numel(), rows * scale_groups(k, group)))
    for what, got, want in sizes:
        if got != want:
            raise ValueError(f"a packed weight [{rows}, {k}] has {got} {what}, not {want}")
    if rows and not 0 <= int(order.min()) <= int(order.max()) < rows:
        raise ValueError(f"a row number of a packed weight [{rows}, {k}] is out of range")
    return shared


@functools.cache
def _kernel(key: KernelKey) -> Any:
    library = built(key.name, emit(key), key.tier.options)
    if library is None:
        return None
    at, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    multiplies = {"lowra_product": (at, at, at, at, size, size, number, number)}
    unpacks = {
        "lowra_turn": (at, at, size, at, size, number, number, number),
        "lowra_values": (at, at, number),
        "lowra_code_sums": (at, at, at, number),
    }
    for name, arguments in (unpacks if key.activations == VALUES else multiplies).items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def product(
    x: Tensor, ready: Prepared, bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """y [..., n] of a few tokens x [..., k], bias and adapter included."""
    n, k = ready.weight.n, ready.weight.k
    shape = [*x.shape]
    y = x.new_empty([*shape[:-1], n])
    m = x.numel() // k
    if not m:
        return y
    stride = k
    if not x.is_contiguous():
        if len(shape) == 2 and x.stride(1) == 1:
            stride = x.stride(0)
        else:
            x = x.contiguous()
    # Held here too, since another thread may put its own in `ready`.
    given, address, kept = ready.extras or _NONE
    wanted = (bias, None, None, 0.0) if factors is None else (bias, *factors)
    if given != _identity(wanted):
        given, address, kept = ready.extras = _extras(wanted)
    ready.kernel.lowra_product(
        ready.address, address, x.data_ptr(), y.data_ptr(), m, stride, KINDS[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


_NONE: tuple[tuple[Any, ...], int, Any] = ((), 0, None)


def _identity(wanted: tuple[Any, ...]) -> tuple[Any, ...]:
    """Equal as long as a structure made of `wanted` leads to the same numbers."""
    bias, a, b, scaling = wanted
    return (
        bias is not None and (bias.data_ptr(), bias.dtype, bias.stride()),
        a is not None
        and (a.data_ptr(), a.dtype, a.stride(), a.shape[0], b.data_ptr(), b.dtype, b.stride()),
        scaling,
    )  # fmt: skip


def _extras(wanted: tuple[Any, ...]) -> tuple[tuple[Any, ...], int, Any]:
    """What `Prepared.extras` holds for a bias and factors."""
    made, kept = _Extras(), []
    bias, a, b, scaling = wanted
    if bias is not None:
        kept.append(bias := _readable(bias))
        made.bias, made.bias_kind = bias.data_ptr(), KINDS[bias.dtype]
    if a is not None:
        a, b = _readable(a), _readable(b)
        if a.dtype != b.dtype:
            a, b = a.float(), b.float()
        kept += [a, b]
        made.a, made.b, made.rank = a.data_ptr(), b.data_ptr(), a.shape[0]
        made.scaling, made.factor_kind = scaling, KINDS[a.dtype]
    # What had to be copied is copied anew for every call, since the original may change.
    same = all(any(t is one for t in wanted[:3]) for one in kept)
    return (_identity(wanted) if same else (), ctypes.addressof(made), (made, kept))


def _readable(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype in KINDS else tensor.float()).contiguous()
