"""OPLoRA (Almansoori et al., 2025, arXiv 2509.19977): the step as a low-rank sub-problem.

A step of gradient descent on the product, b a - lr G, has more than rank r; the nearest product of
rank r is found by alternating least squares, one or two passes, from the factors at hand ("LoRSum":
the best factors for a sum of low-rank terms), without forming the matrix. Momentum is a low-rank
estimate by the same routine, so the state has the size of Adam's. The paper's text was not at hand
beyond its abstract; the formulas here are our reading of it.

Of G [n, k] an optimiser sees da = b' G and db = G a'. They determine its part in the tangent space,
    G^ = db (a a')^-1 a + b (b'b)^-1 (da - (b' db) (a a')^-1 a),
with G^ a' = db and b' G^ = da. The rest changes the answer in second order of lr only. With one
half pass and no momentum the step is b - lr db (a a')^-1, preconditioned LoRA (arXiv 2402.02347).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowra.optim.pairs import OTHERS_RATE, Pair, PairOptimizer

PROXIMAL = 1e-6
"""Weight, in units of the mean eigenvalue, with which a factor is held where it is: directions that
its partner does not have would be lost for good otherwise, such as all of A's where B is 0."""


class OPLoRA(PairOptimizer):
    """OPLoRA over the adapters of `model`.

    lr: of plain gradient descent on the product, not of an adaptive step. momentum: share of the
    old estimate in the new one. passes: of alternating least squares. Raises ValueError for a value
    out of range, or a model without a pair that trains.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1.0, momentum: float = 0.9, passes: int = 1,
        weight_decay: float = 0.0, others_lr: float = OTHERS_RATE,
    ) -> None:  # fmt: skip
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r} must be a number of 0 or more and below 1")
        if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
            raise ValueError(f"passes={passes!r} must be a whole number of 1 or more")
        defaults = {
            "lr": lr, "momentum": momentum, "passes": passes, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(model, others_lr, defaults)

    def _step_pairs(self, pairs: list[Pair], group: dict[str, Any]) -> None:
        for pair in pairs:
            left, right = self._direction(pair, group)
            keep = 1 - group["lr"] * group["weight_decay"]
            a, b = (t.to(right.dtype) for t in pair)
            terms = torch.cat((keep * b, -group["lr"] * left), 1), torch.cat((a, right))
            a, b = nearest_factors(*terms, Pair(a, b), group["passes"])
            pair.a.copy_(a)
            pair.b.copy_(b)

    def _direction(self, pair: Pair, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The gradient, or its moving average, as factors [n, R] and [R, k]."""
        left, right = tangent_gradient(pair)
        share = group["momentum"]
        if not share:
            return left, right
        state = self.state[pair.a]
        if not state:
            state["mean_a"], state["mean_b"] = (
                right[: len(pair.a)].clone(),
                torch.zeros_like(pair.b),
            )
            state["weight"] = torch.zeros(())
        mean = Pair(state["mean_a"], state["mean_b"])
        terms = torch.cat((share * mean.b, (1 - share) * left), 1), torch.cat((mean.a, right))
        mean = nearest_factors(*terms, mean, group["passes"])
        state["mean_a"], state["mean_b"] = mean
        state["weight"] = share * state["weight"] + (1 - share)
        return mean.b / state["weight"], mean.a


def tangent_gradient(pair: Pair) -> tuple[Tensor, Tensor]:
    """What the gradients of the factors tell of that of the product: [n, 2 r] and [2 r, k]."""
    assert pair.a.grad is not None and pair.b.grad is not None
    wide = torch.float64 if pair.a.dtype == torch.float64 else torch.float32
    a, b, da, db = (t.to(wide) for t in (pair.a, pair.b, pair.a.grad, pair.b.grad))
    inner = torch.linalg.pinv(a @ a.T, rtol=PROXIMAL, hermitian=True)
    left = db @ inner
    rest = torch.linalg.pinv(b.T @ b, rtol=PROXIMAL, hermitian=True) @ (da - (b.T @ left) @ a)
    return torch.cat((left, b), 1), torch.cat((a, rest))


def nearest_factors(left: Tensor, right: Tensor, start: Pair, passes: int) -> Pair:
    """Factors whose product is near left right, by alternating least squares from `start`.

    left [n, R], right [R, k]; each factor is held where it is with the weight `PROXIMAL`.
    """
    a, b = start
    for _ in range(passes):
        gram, hold = _held(a @ a.T)
        b = torch.linalg.solve(gram, left @ (right @ a.T) + hold * b, left=False)
        gram, hold = _held(b.T @ b)
        a = torch.linalg.solve(gram, (b.T @ left) @ right + hold * a)
    return Pair(a, b)


def _held(gram: Tensor) -> tuple[Tensor, Tensor]:
    hold = PROXIMAL * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return gram + hold * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), hold
