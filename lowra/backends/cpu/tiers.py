"""Instruction sets that kernels are written for, and which of them this CPU can run."""

from __future__ import annotations

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
    the sums of, `activations` the types that dot products can read.
    """

    name: str
    needs: frozenset[str]
    options: tuple[str, ...]
    vectors: str
    most_step: int
    most_tokens: int
    activations: tuple[str, ...]


_512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni")
TIERS = (
    Tier(
        "avx512-bf16", frozenset((*_512, "avx512_bf16", "fma", "f16c")),
        ("-march=x86-64-v4", "-mavx512vbmi", "-mavx512vnni", "-mavx512bf16"),
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


@functools.lru_cache(maxsize=1)
def best_tier() -> Tier:
    """The best tier of this CPU, or the one that LOWRA_CPU_TIER names if it can run."""
    able = runnable(cpu_flags())
    wanted = os.environ.get(SWITCH)
    named = [tier for tier in able if tier.name == wanted]
    return named[0] if named else able[0]
