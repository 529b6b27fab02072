"""Sums of outer products over tokens, in plain torch."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowra.compiler.ops import LIBRARY

STRIPS = 4
"""Into which a Gram matrix is cut: 5/8 of a whole product is computed."""


def moments(x: Tensor, y: Tensor | None) -> Tensor:
    with _exact_product(x.dtype):
        return gram_of(x.float()) if y is None else x.float().T @ y.float()


def gram_of(rows: Tensor) -> Tensor:
    """rows' rows, float32 [k, k] of [tokens, k]: the upper triangle, strip by strip, mirrored."""
    k = rows.shape[1]
    gram = rows.new_empty(k, k)
    for columns in torch.arange(k).chunk(STRIPS):
        start, end = int(columns[0]), int(columns[-1]) + 1
        strip = rows[:, start:end].T @ rows[:, start:]
        square = strip[:, : end - start]  # not symmetric to the last bit on every CPU
        square.copy_(square.triu() + square.triu(1).T)
        gram[start:end, start:] = strip
        gram[end:, start:end] = strip[:, end - start :].T
    return gram


@contextmanager
def _exact_product(dtype: torch.dtype) -> Generator[None, None, None]:
    """Let float32 products of bfloat16 values run on bfloat16 units: exact, sums in float32."""
    before = torch.get_float32_matmul_precision()
    try:
        if dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


torch.library.impl("lowra::moments", "CompositeExplicitAutograd", moments, lib=LIBRARY)
