"""Instruction sets that kernels are written for, and which of them this CPU can run."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

from lowra.backends.cpu.toolchain import cpu_flags

SWITCH = "LOWRA_CPU_TIER"


@dataclass(frozen=True)
class Tier:
    """One instruction set.

    `needs` are the flags a CPU must report, `options` what the compiler is told, `vectors` the
    header with the vector operations ("" for plain C++), `most_step` the largest integer that a
    looked-up byte may be, `most_tokens` how many tokens of one element per value the registers hold
    the sums of, `activations` the types that dot products can read, `tiles` whether AMX multiplies
    integers of many tokens.
    """

    name: str
    needs: frozenset[str]
    options: tuple[str, ...]
    vectors: str
    most_step: int
    most_tokens: int
    activations: tuple[str, ...]
    tiles: bool = False


_512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni")
_BF16 = (*_512, "avx512_bf16", "fma", "f16c")
_BF16_OPTIONS = ("-march=x86-64-v4", "-mavx512vbmi", "-mavx512vnni", "-mavx512bf16")
TIERS = (
    Tier(
        "amx", frozenset((*_BF16, "amx_tile", "amx_int8")),
        (*_BF16_OPTIONS, "-mamx-tile", "-mamx-int8"),
        "avx512", 255, 4, ("int8", "int16", "bfloat16", "float32"), tiles=True,
    ),
    Tier(
        "avx512-bf16", frozenset(_BF16), _BF16_OPTIONS,
        "avx512", 255, 4, ("int8", "int16", "bfloat16", "float32"),
    ),
    Tier(
        "avx512", frozenset((*_512, "fma", "f16c")),
        ("-march=x86-64-v4", "-mavx512vbmi", "-mavx512vnni"),
        "avx512", 255, 4, ("int8", "int16", "float32"),
    ),
    Tier(
        "avx2", frozenset(("avx2", "fma", "f16c")), ("-march=x86-64-v3",),
        "avx2", 127, 2, ("int8", "int16", "float32"),
    ),
    Tier("plain", frozenset(), (), "", 127, 1, ("float32",)),
)  # fmt: skip
"""Best first."""


def runnable(flags: frozenset[str]) -> tuple[Tier, ...]:
    """The tiers that a CPU with `flags` can run, best first; plain C++ is always among them."""
    return tuple(tier for tier in TIERS if tier.needs <= flags)


_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA = 158, 0x1023, 18
"""Of Linux on x86-64: the system call, and its arguments to ask for AMX's registers."""


@functools.lru_cache(maxsize=1)
def usable_flags() -> frozenset[str]:
    """The instruction sets of this CPU that this process may use.

    Linux gives AMX's tiles to a process that asks for them, and may refuse (sandboxes do).
    """
    flags = cpu_flags()
    if "amx_tile" not in flags:
        return flags
    granted = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_FOR_STATE, _TILE_DATA) == 0
    return flags if granted else frozenset(f for f in flags if not f.startswith("amx"))


@functools.lru_cache(maxsize=1)
def best_tier() -> Tier:
    """The best tier of this CPU, or the one that LOWRA_CPU_TIER names if it can run."""
    able = runnable(usable_flags())
    wanted = os.environ.get(SWITCH)
    named = [tier for tier in able if tier.name == wanted]
    return named[0] if named else able[0]
