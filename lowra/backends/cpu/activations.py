"""What products on this CPU can read activations as."""

from __future__ import annotations

import functools

import torch

from lowra.backends.activations import get_activations
from lowra.backends.cpu.tiers import best_tier

LARGEST_INTEGER_K = 1 << 15
"""Above it sums of integer products might pass 32 bits."""


def activations_for(dtype: torch.dtype, k: int) -> str:
    """In what type a product with k columns reads activations of `dtype` on this CPU."""
    return _readable(get_activations(), dtype, k)


@functools.cache
def _readable(chosen: str, dtype: torch.dtype, k: int) -> str:
    if dtype == torch.float32 or chosen not in best_tier().activations:
        return "float32"
    return "float32" if chosen.startswith("int") and k > LARGEST_INTEGER_K else chosen
