"""KL of next-token logits against float64, its gradient against autograd, over several chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowra.passes.tuning.divergence import CHUNK, divergence


def logits(positions: int, seed: int) -> Tensor:
    return 3 * torch.randn(2, positions, 11, generator=torch.Generator().manual_seed(seed))


def reference(found: Tensor, wanted: Tensor) -> Tensor:
    likely, given = wanted.log_softmax(-1), found.log_softmax(-1)
    return (likely.exp() * (likely - given)).sum(-1).mean()


@pytest.mark.parametrize("positions", [1, CHUNK - 1, CHUNK + 3])
def test_the_mean_and_its_gradient_are_those_of_float64(positions: int) -> None:
    found, wanted = logits(positions, 0).requires_grad_(), logits(positions, 1)
    exact = found.detach().double().requires_grad_()
    kl, true = divergence(found, wanted), reference(exact, wanted.double())
    torch.testing.assert_close(kl.double(), true, rtol=1e-6, atol=0)
    (2 * kl).backward()
    (2 * true).backward()
    assert found.grad is not None and exact.grad is not None
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


def test_without_a_gradient_the_mean_is_the_same_and_equal_logits_are_at_no_distance() -> None:
    found, wanted = logits(40, 0), logits(40, 1)
    assert torch.equal(
        divergence(found, wanted), divergence(found.clone().requires_grad_(), wanted)
    )
    assert float(divergence(found, found)) == 0.0
