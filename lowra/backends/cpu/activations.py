"""In what type products on packed weights read activations: one choice for the whole process."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

from lowra.backends.cpu.tiers import best_tier
from lowra.compiler.errors import LowraError

SWITCH = "LOWRA_CPU_ACTIVATIONS"
CHOICES = ("int16", "int8", "bfloat16", "float32")
"""The first is the default."""

LARGEST_INTEGER_K = 1 << 15
"""Above it sums of integer products might pass 32 bits."""

_chosen: str | None = None


def get_activations() -> str:
    """What `set_activations` chose last, else LOWRA_CPU_ACTIVATIONS, else "int16".

    Raises LowraError where the environment names none of `CHOICES`.
    """
    return _checked(_chosen or os.environ.get(SWITCH) or CHOICES[0])


def set_activations(kind: str) -> None:
    """From now on, read bfloat16 and float16 activations as `kind` in products on a CPU.

    "int16" (the default) is 15 bits and a scale per token: nearer to the true product than a half
    is. "int8" is 7 bits and a scale per token: faster with many tokens, and a little less exact
    (README, Speed on a CPU, has both). "bfloat16" and "float32" convert. A CPU that cannot do
    the chosen one takes float32, as float32 activations always do. Raises LowraError for another
    kind.
    """
    global _chosen
    _chosen = _checked(kind)
    activations_for.cache_clear()


@contextlib.contextmanager
def activations(kind: str | None) -> Iterator[None]:
    """`set_activations(kind)` for as long as the block runs; None changes nothing."""
    global _chosen
    before = _chosen
    if kind is not None:
        set_activations(kind)
    try:
        yield
    finally:
        _chosen = before
        activations_for.cache_clear()


@functools.cache
def activations_for(dtype: torch.dtype, k: int) -> str:
    """In what type a product with k columns reads activations of `dtype` on this CPU."""
    chosen = get_activations()
    if dtype == torch.float32 or chosen not in best_tier().activations:
        return "float32"
    return "float32" if chosen.startswith("int") and k > LARGEST_INTEGER_K else chosen


def _checked(kind: str) -> str:
    if kind not in CHOICES:
        raise LowraError(f"{kind!r} is no type of activations: choose {', '.join(CHOICES)}")
    return kind
