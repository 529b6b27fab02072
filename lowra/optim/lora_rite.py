"""LoRA-RITE (Yen et al., ICLR 2025, arXiv 2410.20625): Adam in the space of the product.

For a factor X with partner Y (B with A', or A' with B), Y = U R with orthonormal columns U. The
"unmagnified" gradient g = dX R^-1 is that of the product along U, whatever the split between X and
Y. Its r x r second moment V and first moment M live in the basis U; as U turns between steps, the
rotation P = U_t' U_{t-1} carries them over, and what of V the new basis does not hold is kept as
the escaped mass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowra.optim.pairs import OTHERS_RATE, Pair, PairOptimizer


class LoRARite(PairOptimizer):
    """LoRA-RITE over the adapters of `model`.

    lr: of the preconditioned step, whose entries are about 1. betas: of the first and the second
    moment, bias-corrected. clip: most norm of all unmagnified gradients together; 0: any.
    escape: count the mass that a turn of the basis loses; the published code does not by default.
    Raises ValueError for a value out of range, or a model without a pair that trains.
    """

    def __init__(
        self, model: nn.Module, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6, weight_decay: float = 0.0, clip: float = 1.0, escape: bool = True,
        others_lr: float = OTHERS_RATE,
    ) -> None:  # fmt: skip
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas!r} must be two numbers of 0 or more and below 1")
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip": clip,
            "escape": escape,
        }  # fmt: skip
        super().__init__(model, others_lr, defaults)

    def _step_pairs(self, pairs: list[Pair], group: dict[str, Any]) -> None:
        sides = [side for pair in pairs for side in self._sides(pair)]
        total = sum(float(side.gradient.square().sum()) for side in sides) ** 0.5
        shrink = group["clip"] / total if 0 < group["clip"] < total else 1.0
        moves = [side.move(shrink, group) for side in sides]
        for side, move in zip(sides, moves, strict=True):
            side.factor.mul_(1 - group["lr"] * group["weight_decay"])
            side.factor.sub_(move.to(side.factor.dtype), alpha=group["lr"])

    def _sides(self, pair: Pair) -> list[_Side]:
        grad_a, grad_b = pair.a.grad, pair.b.grad
        assert grad_a is not None and grad_b is not None
        return [
            _Side(pair.b, pair.a.T, grad_b, self._state(pair, "b")),
            _Side(pair.a.T, pair.b, grad_a.T, self._state(pair, "a")),
        ]

    def _state(self, pair: Pair, side: str) -> dict[str, Tensor]:
        """The state of a side, of the tensors in torch's state of the factor."""
        factor, partner = (pair.b, pair.a) if side == "b" else (pair.a, pair.b)
        state = self.state[factor]
        if not state:
            rank = pair.a.shape[0]
            rows, others = factor.numel() // rank, partner.numel() // rank
            state["step"] = torch.zeros(())
            state["first"] = _zeros(factor, rows, rank)
            state["second"] = _zeros(factor, rank, rank)
            state["basis"] = _zeros(factor, others, rank)
            state["escaped"] = torch.zeros(())
        return state


class _Side:
    """One factor [rows, r], as columns of the rank, and its partner's basis."""

    def __init__(
        self, factor: Tensor, partner: Tensor, gradient: Tensor, state: dict[str, Tensor]
    ) -> None:
        self.factor, self.state = factor, state
        wide = _precise(factor.dtype)
        self.basis, upper = torch.linalg.qr(partner.to(wide))
        self.inverse = torch.linalg.pinv(upper)
        self.gradient = gradient.to(wide) @ self.inverse

    def move(self, shrink: float, group: dict[str, Any]) -> Tensor:
        """The step of the factor at rate 1, [rows, r]; the state moves on."""
        state, gradient = self.state, self.gradient * shrink
        state["step"] += 1
        first, second = (_corrected(beta, float(state["step"])) for beta in group["betas"])
        turn = self.basis.T @ state["basis"]
        old, carried = state["second"], _symmetric(turn @ state["second"] @ turn.T)
        if group["escape"]:
            state["escaped"] = second * (state["escaped"] + _escaped(old, carried))
        state["second"] = carried.lerp(gradient.T @ gradient / len(gradient), 1 - second)
        step = gradient @ _inverse_root(state["second"], state["escaped"], group["eps"])
        state["first"] = (state["first"] @ turn.T).lerp(step, 1 - first)
        state["basis"] = self.basis
        return state["first"] @ self.inverse.T


def _corrected(beta: float, steps: float) -> float:
    """The decay whose moving average needs no bias correction (arXiv 1804.04235, section 7.1)."""
    return beta * (1 - beta ** (steps - 1)) / (1 - beta**steps)


def _escaped(old: Tensor, new: Tensor) -> Tensor:
    """The largest eigenvalue lost, at most the trace lost."""
    lost = (torch.linalg.eigvalsh(old) - torch.linalg.eigvalsh(new)).max()
    return torch.minimum(lost, old.trace() - new.trace()).clamp_min(0)


def _inverse_root(second: Tensor, escaped: Tensor, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh(second)
    return vectors / ((values + escaped).clamp_min(0).sqrt() + eps) @ vectors.T


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _zeros(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=_precise(like.dtype), device=like.device)
