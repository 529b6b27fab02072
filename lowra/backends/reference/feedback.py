"""Error feedback (GPTQ, arXiv 2210.17323) and coordinate descent on codes, in plain torch.

Both round one column of all rows after another, so a run of trellis codes takes the best path for a
column's errors as they are then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.backends.reference.paths import Rounding
from lowra.compiler.ops import LIBRARY

PANEL = 64


def feedback_codes(
    weight: Tensor, upper: Tensor | None, tables: Tensor, scales: Tensor | None, columns: Tensor,
    runs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Columns in turn, each error spread over the columns still to come; behind a panel of
    columns as one product. Without `upper`, nothing is spread."""
    n, k = weight.shape
    w = weight.T.clone(memory_format=torch.contiguous_format)
    factors = weight.new_ones(1, n) if scales is None else scales.T.contiguous()
    rounded, places = Rounding.of(tables, runs), columns.tolist()
    codes = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    for start in range(0, k, PANEL):
        end = min(start + PANEL, k)
        errors = weight.new_empty(end - start, n)
        for i in range(start, end):
            codes[i], value = rounded(w[i], factors[places[i]])
            if upper is None:
                continue
            error = errors[i - start] = (w[i] - value) / upper[i, i]
            w[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
        if upper is not None:
            w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()


def descend_codes(
    weight: Tensor, gram: Tensor, tables: Tensor, scales: Tensor | None, columns: Tensor,
    codes: Tensor, slope: Tensor | None, sweeps: int, runs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each column in turn to the level that is best given all others: with e = w - q, the best
    value of column i is q_i + (e G)_i / G_ii, rounded. No step raises e G e', or its sum over the
    rows of a run."""
    n, k = weight.shape
    codes = codes.clone()
    factors = weight.new_ones(1, n) if scales is None else scales.T.contiguous()
    rounded, places = Rounding.of(tables, runs), columns.tolist()
    values = values_of(tables, scales, columns, codes)
    slope = gram @ (weight.T - values) if slope is None else slope.T.clone()
    for _ in range(sweeps):
        before = codes.clone()
        for i in range(k):
            code, value = rounded(values[i] + slope[i] / gram[i, i], factors[places[i]])
            slope.addr_(gram[i], value - values[i], alpha=-1)
            values[i], codes[:, i] = value, code
        if torch.equal(before, codes):
            break
    return codes, slope.T.contiguous()


def values_of(tables: Tensor, scales: Tensor | None, columns: Tensor, codes: Tensor) -> Tensor:
    """What codes uint8 [n, k] stand for: float32 [k, n]."""
    values = tables.gather(1, codes.long()).T
    return (values if scales is None else values * scales.T[columns]).contiguous()


for _kernel in (feedback_codes, descend_codes):
    torch.library.impl(
        f"lowra::{_kernel.__name__}", "CompositeExplicitAutograd", _kernel, lib=LIBRARY
    )
