"""Input rotation: a seeded randomised Hadamard transform along K, in blocks of a power of two.

x~ = H D x with D = diag(+-1) from the seed and H block-diagonal Sylvester-Hadamard, scaled to be
orthogonal (QuIP#, arXiv 2402.04396). A weight keeps its product, W x = (W D H) x~, so rows of the
weight rotate by the same function as activations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_BLOCK = 4096
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Rotation:
    """Seed of the signs and block size; block 1 means no rotation at all."""

    seed: int = 0
    block: int = 1

    @property
    def active(self) -> bool:
        return self.block > 1


def largest_block(k: int) -> int:
    """The largest power of two that divides `k`, at most 4096."""
    return min(k & -k, MAX_BLOCK)


def signs(seed: int, k: int) -> Tensor:
    """The k signs of D as float64: the top bit of splitmix64 at position i of stream `seed`."""
    return torch.from_numpy(_signs(seed, k).copy())


@functools.lru_cache(maxsize=256)
def _signs(seed: int, k: int) -> np.ndarray:
    start = np.uint64((seed * 0xD1B54A32D192ED03) & _MASK)
    with np.errstate(over="ignore"):
        z = start + np.arange(1, k + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return 1.0 - 2.0 * (z >> np.uint64(63)).astype(np.float64)


@functools.lru_cache(maxsize=64)
def _sylvester(size: int) -> np.ndarray:
    h = np.ones((1, 1))
    while h.shape[0] < size:
        h = np.block([[h, h], [h, -h]])
    return h / math.sqrt(size)


def _hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply each block of the last axis by the orthogonal Hadamard matrix (symmetric)."""
    outer = 1 << ((block.bit_length() - 1) // 2)
    inner = block // outer
    left = torch.tensor(_sylvester(outer), dtype=x.dtype, device=x.device)
    right = torch.tensor(_sylvester(inner), dtype=x.dtype, device=x.device)
    tiles = x.reshape(-1, outer, inner) @ right
    return torch.matmul(left, tiles).reshape(x.shape)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x~ = H D x along the last axis, in the dtype of x (float32 or float64)."""
    if not rotation.active:
        return x
    d = signs(rotation.seed, x.shape[-1]).to(dtype=x.dtype, device=x.device)
    return _hadamard(x * d, rotation.block)


def unrotate(x: Tensor, rotation: Rotation) -> Tensor:
    """The inverse of `rotate`: x = D H x~."""
    if not rotation.active:
        return x
    d = signs(rotation.seed, x.shape[-1]).to(dtype=x.dtype, device=x.device)
    return _hadamard(x, rotation.block) * d


DENSE_BLOCK = 512
"""The largest block that activations are multiplied by as one matrix."""


def rotate_activations(x: Tensor, rotation: Rotation) -> Tensor:
    """`rotate` in the dtype of x, half precision included, as one product; differentiable.

    The matrix holds powers of two, which are exact, so that only the result is rounded.
    """
    if not rotation.active or rotation.block > DENSE_BLOCK:
        return rotate(x.float(), rotation).to(x.dtype) if rotation.active else x
    power = (rotation.block.bit_length() - 1) // 2
    rest = 2.0**power / math.sqrt(rotation.block)
    signed = x * signs(rotation.seed, x.shape[-1]).to(dtype=x.dtype, device=x.device)
    h = torch.sign(torch.from_numpy(_sylvester(rotation.block))).to(x) / 2.0**power
    y = (signed.reshape(-1, rotation.block) @ h).reshape(x.shape)
    return y if rest == 1.0 else y * rest


def rotate_gram(gram: Tensor, rotation: Rotation) -> Tensor:
    """The Gram matrix [k, k] of rotated inputs: both sides of `gram` rotated."""
    return rotate(rotate(gram, rotation).T.contiguous(), rotation)
