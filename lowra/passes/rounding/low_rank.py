"""Low-rank parts of a weight: the closed form, and requantizing in turn with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lowra.compiler.storage import PackedWeight
from lowra.passes.rounding.feedback import DAMPING
from lowra.passes.rounding.moments import output_error


class LowRank(Protocol):
    """Something that stands for a dense [n, k] of low rank."""

    def product(self) -> Tensor: ...


@dataclass(frozen=True)
class Factors:
    """float32 B [n, r] and A [r, k]."""

    b: Tensor
    a: Tensor

    def product(self) -> Tensor:
        return self.b @ self.a


L = TypeVar("L", bound=LowRank)


@dataclass(frozen=True)
class Split(Generic[L]):
    """W as a packed base and a low-rank part, and tr(E G E') of what both leave."""

    base: PackedWeight
    part: L
    error: float


def alternate(
    weight: Tensor,
    gram: Tensor,
    base: PackedWeight,
    fit: Callable[[Tensor], L],
    requantize: Callable[[Tensor], PackedWeight],
    rounds: int,
) -> Split[L]:
    """`fit` the low-rank part to W - Q; `rounds` times, Q anew for W - part, and the part to that.

    W [n, k] and gram in original coordinates. A round counts where it lowers tr(E G E') of both
    together, and the first that does not ends it: from the same part it would only come again. So
    the error never rises, which alternation by weight norm (LoftQ) does not promise.
    """
    best = _split(weight, gram, base, fit)
    for _ in range(rounds):
        now = _split(weight, gram, requantize(weight - best.part.product()), fit)
        if not now.error < best.error:
            break
        best = now
    return best


def _split(
    weight: Tensor, gram: Tensor, base: PackedWeight, fit: Callable[[Tensor], L]
) -> Split[L]:
    residual = weight - base.dequantize()
    part = fit(residual)
    return Split(base, part, output_error(residual - part.product(), gram))


def closed_form(error: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [n, r], A [r, k] float32 minimising tr((E - BA) G (E - BA)') for E [n, k].

    With M = E L, G = L L', M = U S V': B = U_r sqrt(S_r), A = sqrt(S_r) V_r' L^-1. The singular
    vectors come from the symmetric eigenproblem of the smaller side, in float64; for n <= k that
    is M M' = E G E' and V_r' L^-1 = S_r^-1 U_r' E, so G is not factored.
    """
    n, k = error.shape
    e, g = error.double(), gram.double()
    g = g + torch.eye(k, dtype=g.dtype) * (DAMPING * (float(g.diagonal().mean()) or 1.0))
    if n <= k:
        squares, u = _largest(e @ g @ e.T, rank)
        sizes = squares.clamp_min(0).sqrt()
        coefficients = u.T @ e
    else:
        lower = torch.linalg.cholesky(g)
        m = e @ lower
        v = _largest(m.T @ m, rank)[1]
        image = m @ v
        sizes = image.norm(dim=0)
        u = image / sizes.clamp_min(1e-30)
        right = torch.linalg.solve_triangular(lower, v.T.contiguous(), upper=False, left=False)
        coefficients = sizes[:, None] * right
    root = sizes.clamp_min(1e-30).sqrt()
    live = (sizes > 1e-12 * sizes.max().clamp_min(1e-300)).double()
    return (u * (root * live)).float(), (coefficients / root[:, None] * live[:, None]).float()


LEAST_WEIGHT = 1e-3
"""Of the mean: what a row counts at least, so that rows the loss never saw keep finite factors."""


def two_sided(error: Tensor, gram: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [n, r], A [r, k] minimising sum_j rows_j e_j G e_j' for E - BA, with rows [n] >= 0.

    The closed form of D^1/2 E with D = diag(rows), and D^-1/2 taken back out of B.
    """
    mean = float(rows.double().mean()) or 1.0
    root = rows.double().clamp_min(LEAST_WEIGHT * mean).div(mean).sqrt().float().unsqueeze(1)
    b, a = closed_form(error * root, gram, rank)
    return b / root, a


def _largest(square: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues [r] and eigenvectors [k, r] of a symmetric float64 [k, k].

    Solved in float32, in half the time: a vector's error costs its square in captured energy.
    """
    size = float(square.diagonal().mean()) or 1.0
    values, vectors = torch.linalg.eigh((square / size).float())
    return values[-rank:].flip(0).double() * size, vectors[:, -rank:].flip(1).double()
