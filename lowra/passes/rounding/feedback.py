"""Error feedback (GPTQ, arXiv 2210.17323) with a codebook of its own for every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.errors import CalibrationError
from lowra.compiler.storage import NO_SCALES, ROW_SCALES
from lowra.compiler.trellis import RUN

DAMPING = 0.01


@dataclass(frozen=True)
class Factor:
    """Upper Cholesky factor U of the inverse Gram matrix (float32 [k, k]) in column order `order`.

    Columns go from the largest input energy to the smallest. 1 / U_ii^2 is the variance of input i
    given the inputs after it: the weight that a rounding error of column i has once later columns
    have compensated for it.
    """

    order: Tensor
    upper: Tensor
    damping: float
    """What was added to the diagonal of the Gram matrix."""

    def conditional_variance(self) -> Tensor:
        """float32 [k] in original column order."""
        result = torch.empty_like(self.upper[0])
        result[self.order] = self.upper.diagonal() ** -2
        return result


def factorize(gram: Tensor, damping: float = DAMPING) -> Factor:
    """Factor of `gram` [k, k] with `damping` times its mean diagonal added.

    Singular matrices are damped harder, tenfold at a time. Raises CalibrationError when the matrix
    holds NaN, or no damping helps.
    """
    if not bool(torch.isfinite(gram).all()):
        raise CalibrationError(f"a Gram matrix of size {gram.shape[0]} holds NaN or infinity")
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    back = order.flip(0)
    mean = float(gram.diagonal().double().mean()) or 1.0
    for attempt in range(6):
        added = mean * damping * 10**attempt
        upper = _inverse_root(gram[back][:, back], added)
        if upper is not None:
            return Factor(order, upper, added)
    raise CalibrationError(f"a Gram matrix of size {gram.shape[0]} is not positive definite")


def _inverse_root(reversed_gram: Tensor, damping: float) -> Tensor | None:
    """U upper with U'U the inverse of the damped matrix H, given with rows and columns reversed.

    Reversed, H = M M'; so H = R R' with R = M reversed, an upper triangle, and U = R^-1. In float32
    where that goes well, else in float64, else None.
    """
    for dtype in (torch.float32, torch.float64):
        eye = torch.eye(reversed_gram.shape[0], dtype=dtype)
        lower, failed = torch.linalg.cholesky_ex(reversed_gram.to(dtype) + eye * damping)
        if int(failed):
            continue
        upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).float()
        if bool(torch.isfinite(upper).all()):
            return upper.contiguous()
    return None


def thresholds_of(tables: Tensor) -> Tensor:
    """Midpoints [n, L - 1] of ascending tables [n, L]; +inf stays +inf."""
    return (tables[:, 1:] + tables[:, :-1]) / 2


def scale_index(k: int, group: int) -> Tensor:
    """int64 [k]: which scale of its row a column uses."""
    return torch.arange(k) // (k if group in (NO_SCALES, ROW_SCALES) else group)


def nearest_codes(
    weight: Tensor, tables: Tensor, scales: Tensor | None, group: int,
    thresholds: Tensor | None = None, runs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Codes int64 [n, k] of the nearest level, each weight on its own, or of the best path of each
    column through `runs` of trellis codes (lowra.compiler.packing.trellis_runs).

    `thresholds` [n, L - 1], filled with +inf, stand for the middles between levels where given; a
    value on a threshold goes below it.
    """
    if runs is not None:
        index, safe = scale_index(weight.shape[1], group), _safe(scales, runs)
        return torch.ops.lowra.feedback_codes(weight, None, tables, safe, index, runs).long()
    if scales is not None:
        divisor = torch.where(scales == 0, 1.0, scales)
        weight = weight / divisor[:, scale_index(weight.shape[1], group)]
    borders = thresholds_of(tables) if thresholds is None else thresholds
    return torch.searchsorted(borders.contiguous(), weight.contiguous())


def path_codes(values: Tensor, levels: Tensor, scales: Tensor, group: int) -> Tensor:
    """Codes int64 [n, k] of a panel of trellis codes on shared levels [L], each column alone."""
    tables = levels.float().expand(values.shape[0], -1).contiguous()
    runs = torch.arange(values.shape[0]) // RUN
    return nearest_codes(values, tables, scales.float(), group, runs=runs)


def feedback_codes(
    weight: Tensor, factor: Factor, tables: Tensor, scales: Tensor | None, group: int,
    runs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Codes int64 [n, k], columns in turn, each error spread over the columns still to come.

    weight float32 [n, k]; tables float32 [n, L] ascending, narrower rows filled with +inf;
    scales float32 [n, groups] or None. `runs`: as for `nearest_codes`.
    """
    order = factor.order
    columns = scale_index(weight.shape[1], group)[order]
    codes = torch.ops.lowra.feedback_codes(
        weight[:, order], factor.upper, tables, _safe(scales, runs), columns, runs
    )
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result.long()


def descend_codes(
    weight: Tensor, gram: Tensor, tables: Tensor, scales: Tensor | None, group: int, codes: Tensor,
    sweeps: int, slope: Tensor | None = None, runs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes int64 [n, k] after `sweeps` of coordinate descent on e G e', and their slope e G
    [n, k]; `slope` is that of the codes given, where it is known."""
    moved, left = torch.ops.lowra.descend_codes(
        weight, gram, tables, _safe(scales, runs),
        scale_index(weight.shape[1], group), codes.to(torch.uint8), slope, sweeps, runs,
    )  # fmt: skip
    return moved.long(), left


def _safe(scales: Tensor | None, runs: Tensor | None) -> Tensor | None:
    """Scales to divide by: ones in place of zeros, which store zeros anyway. Rows in runs keep
    theirs: a path divides by none, and a row that stores zeros must have no say in it."""
    if scales is None:
        return None
    own = scales == 0
    return torch.where(own if runs is None else own & (runs < 0).unsqueeze(1), 1.0, scales)
