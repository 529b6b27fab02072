"""Error feedback (GPTQ, arXiv 2210.17323) in plain torch: what `feedback_codes` means."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.compiler.ops import LIBRARY

PANEL = 64


def feedback_codes(
    weight: Tensor, upper: Tensor, tables: Tensor, scales: Tensor | None, columns: Tensor
) -> Tensor:
    """Columns in turn, each error spread over the columns still to come; behind a panel of
    columns as one product."""
    n, k = weight.shape
    w = weight.T.contiguous()
    factors = torch.ones(1, n) if scales is None else scales.T.contiguous()
    thresholds = ((tables[:, 1:] + tables[:, :-1]) / 2).contiguous()
    finite = torch.where(torch.isinf(tables), torch.zeros(()), tables)
    codes = torch.empty(k, n, dtype=torch.uint8)
    for start in range(0, k, PANEL):
        end = min(start + PANEL, k)
        errors = torch.empty(end - start, n)
        for i in range(start, end):
            scale = factors[columns[i]]
            code = torch.searchsorted(thresholds, (w[i] / scale).unsqueeze(1))
            level = finite.gather(1, code).squeeze(1) * scale
            error = (w[i] - level) / upper[i, i]
            w[i + 1 : end].addr_(upper[i, i + 1 : end], error, alpha=-1)
            codes[i], errors[i - start] = code.squeeze(1), error
        w[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()


torch.library.impl(
    "lowra::feedback_codes", "CompositeExplicitAutograd", feedback_codes, lib=LIBRARY
)
