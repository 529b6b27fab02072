"""From codebooks and widths to a packed weight; shared by quantize-weights and LoftQ."""

from __future__ import annotations

import torch
from torch import Tensor

from lowra.compiler.facts import Codebooks
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import NO_SCALES, PackedWeight, pack_weight
from lowra.passes.feedback import Factor, feedback_codes, nearest_codes, scale_index


def quantize(
    weight: Tensor, gram: Tensor | None, factor: Factor | None, books: Codebooks,
    row_widths: Tensor, rotation: Rotation,
) -> PackedWeight:  # fmt: skip
    """Quantize float32 [n, k], given in the coordinates of `rotation`.

    With `factor`, codes come from error feedback and each row's scale is then refit in closed form
    against `gram` (kept where the row's output error falls); without, each weight goes to its
    nearest level.
    """
    tables, scales = row_tables(books, row_widths)
    if factor is None or gram is None:
        codes = nearest_codes(weight, tables, scales, books.group)
    else:
        codes = feedback_codes(weight, factor, tables, scales, books.group)
        tables, scales = _refit(weight, gram, codes, tables, scales, books)
    shared = {b: books.levels[b] for b in row_widths.unique().tolist()} if books.shared else None
    return pack_weight(codes, row_widths, shared or tables, scales, books.group, rotation)


def row_tables(books: Codebooks, row_widths: Tensor) -> tuple[Tensor, Tensor | None]:
    """Levels [n, L] (narrow rows filled with +inf) and scales [n, groups] at the rows' widths."""
    n = row_widths.shape[0]
    used = [int(b) for b in row_widths.unique()]
    tables = torch.full((n, 1 << max(used)), torch.inf)
    scales: Tensor | None = None
    for width in used:
        rows = row_widths == width
        levels = books.levels[width]
        tables[rows, : 1 << width] = levels if books.shared else levels[rows]
        if books.scales is not None:
            scales = torch.zeros(n, books.scales[width].shape[1]) if scales is None else scales
            scales[rows] = books.scales[width][rows]
    return tables, scales


def _refit(
    weight: Tensor, gram: Tensor, codes: Tensor,
    tables: Tensor, scales: Tensor | None, books: Codebooks,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Multiply each row by its best factor f = (q G w') / (q G q'), rounded as it is stored."""
    value = tables.gather(1, codes)
    if scales is not None:
        value = value * scales[:, scale_index(weight.shape[1], books.group)]
    product = value @ gram
    above, below = (product * weight).sum(1), (product * value).sum(1)
    factor = torch.where((below > 0) & (above > 0), above / below.clamp_min(1e-30), 1.0)
    if books.group == NO_SCALES:
        return (tables * factor.unsqueeze(1)).half().float(), scales
    assert scales is not None
    return tables, (scales * factor.unsqueeze(1)).half().float()


def output_error(error: Tensor, gram: Tensor) -> float:
    """tr(E G E') for E [n, k] in the coordinates of `gram`."""
    return float(((error @ gram) * error).sum(dtype=torch.float64))
