"""Baselines for adapters against their published formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.adapters.baselines import BASELINES
from benchmarks.adapters.baselines.billm import fit as billm_fit
from benchmarks.adapters.baselines.billm import residual_sizes
from benchmarks.adapters.baselines.compressed import GROUP
from benchmarks.adapters.baselines.gptq import feedback, gptq, inverse_root
from benchmarks.adapters.baselines.jd_diagonal import diagonalised, jd_diagonal
from benchmarks.adapters.baselines.pb_llm import fit as pb_llm_fit
from benchmarks.adapters.baselines.pb_llm import most_salient
from benchmarks.adapters.baselines.rtn import binary, rtn
from lowra.adapters.factors import LowRank

R, N, K = 8, 200, 320


def adapter(seed: int = 0, name: str = "layer") -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(R, K, generator=generator)
    return LowRank(name, a, 0.1 * torch.randn(N, R, generator=generator), 2.0)


def gram(seed: int = 1) -> Tensor:
    """Of inputs in a few directions, so that columns stand for one another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, 40, generator=generator) @ torch.randn(40, K, generator=generator)
    return x.T @ x + torch.eye(K)


def lost(one: LowRank, factors: tuple[Tensor, Tensor], metric: Tensor) -> float:
    """|(B A - B^ A^) X|^2 / |B A X|^2."""
    a, b = factors
    whole = one.b.double() @ one.a.double()
    error = whole - b.double() @ a.double()
    root = torch.linalg.cholesky(metric.double())
    return float((error @ root).square().sum() / (whole @ root).square().sum())


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_baseline_gives_all_factors_and_honest_bits(name: str) -> None:
    adapters = [adapter(0, "one"), adapter(1, "two")]
    done = BASELINES[name](adapters, {"one": gram(), "two": gram()})
    assert list(done.factors) == ["one", "two"]
    a, b = done.factors["two"]
    assert a.shape == (R, K) and b.shape == (N, R) and a.isfinite().all() and b.isfinite().all()
    bits = done.bits / sum(one.parameters for one in adapters)
    nominal = int(name.split()[1]) if " " in name else {"BIN": 1, "PB-LLM": 2, "BiLLM": 1}[name]
    assert nominal < bits < nominal + 5  # a row of B has but 8 columns, and scales of its own


def test_every_bit_of_signs_and_of_gptq_is_counted() -> None:
    """GPTQ's groups lie along rows: one per row of B, of but R columns."""
    one = adapter()
    assert binary([one], {}).bits == one.parameters + 16 * R * (-(-K // GROUP) + -(-N // GROUP))
    for bits in (2, 3, 4):
        done = gptq([one], {"layer": gram()}, bits)
        groups = R * -(-K // GROUP) + N * -(-R // GROUP)
        assert done.bits == bits * one.parameters + groups * (16 + bits)


def test_rtn_is_the_formula() -> None:
    one, group = adapter(), slice(0, GROUP)
    done = rtn([one], {}, bits=3)
    w = one.a[2, group]
    scale = ((w.max() - w.min()) / 7).half().float()
    zero = (-(w.min() / ((w.max() - w.min()) / 7)).round()).clamp(0, 7)
    want = ((w / scale).round() + zero).clamp(0, 7).sub(zero) * scale
    assert torch.allclose(done.factors["layer"][0][2, group], want)
    groups = R * (-(-K // GROUP) + -(-N // GROUP))
    assert done.bits == 3 * one.parameters + groups * (16 + 3)


def test_feedback_without_correlation_is_rounding_to_nearest() -> None:
    one = adapter()
    done = gptq([one], {"layer": torch.eye(K)}, bits=3)
    assert torch.allclose(done.factors["layer"][0], rtn([one], {}, bits=3).factors["layer"][0])


def test_feedback_loses_less_in_the_metric_of_the_inputs() -> None:
    one, metric = adapter(), gram()
    plain, fed = (f([one], {"layer": metric}, bits=3) for f in (rtn, gptq))
    # Of A alone: B's are on another axis.
    left, right = ((c.factors["layer"][0], one.b) for c in (fed, plain))
    assert lost(one, left, metric) < 0.5 * lost(one, right, metric)


def test_the_root_is_that_of_the_inverse() -> None:
    metric = gram().double()
    root = inverse_root(metric)
    damped = metric + 0.1 * metric.diagonal().mean() * torch.eye(K)
    assert torch.allclose(root.T @ root @ damped, torch.eye(K).double(), atol=1e-8)
    assert torch.equal(root, root.triu())


def test_pb_llm_keeps_a_tenth_in_eight_bits() -> None:
    block = torch.randn(20, 50, generator=torch.Generator().manual_seed(2))
    salient = most_salient(block, torch.ones(50))
    assert int(salient.sum()) == 100
    assert float(block.abs()[salient].min()) >= float(block.abs()[~salient].max())
    column, bits = pb_llm_fit(block, torch.ones(50))
    stored = torch.stack([column(j, block[:, j]) for j in range(50)], 1)
    span = torch.where(salient, block, 0)
    step = (span.amax(1) - span.amin(1).clamp(max=0)) / 255
    assert bool(((stored - block).abs()[salient] <= 0.51 * step.max()).all())
    low = stored[0][~salient[0]].abs()
    assert torch.allclose(low, block[0][~salient[0]].abs().mean().expand_as(low), rtol=1e-3)
    assert bits == 1000 + 100 * 8 + 900 + 20 * (2 * 16 + 8)


def test_billm_beats_one_sign_and_counts_its_maps() -> None:
    block = torch.randn(30, 64, generator=torch.Generator().manual_seed(3))
    block[:, :4] *= 5
    column, bits = billm_fit(block, torch.ones(64))
    stored = torch.stack([column(j, block[:, j]) for j in range(64)], 1)
    signs = block.sign() * block.abs().mean(1, keepdim=True)
    assert float((stored - block).norm()) < 0.5 * float((signs - block).norm())
    assert bits == 2 * block.numel() + 64 + 30 * 4 * 16
    first, second = residual_sizes(block[:, :4])
    assert torch.allclose(first, block[:, :4].abs().mean(1), rtol=1e-3)
    assert bool((second < first).all())


def test_adapters_of_one_basis_are_kept() -> None:
    """Up to what turns of least squares have not reached yet."""
    generator = torch.Generator().manual_seed(4)
    u, v = torch.randn(N, R, generator=generator), torch.randn(R, K, generator=generator)
    family = [LowRank("layer", v, u * torch.rand(R, generator=generator), 1.0) for _ in range(3)]
    done = jd_diagonal([[one] for one in family], R)
    for one, compressed in zip(family, done, strict=True):
        assert lost(one, compressed.factors["layer"], torch.eye(K)) < 3e-2
    assert done[0].bits == pytest.approx(16 * (R * (N + K) / 3 + R + 1))


def test_a_larger_basis_loses_less() -> None:
    family = [adapter(seed) for seed in range(3)]
    errors = []
    for rank in (4, 8, 16):
        u, v, cores = diagonalised(family, rank)
        errors.append(sum(lost(one, (v.T, u * core), torch.eye(K))
                          for one, core in zip(family, cores, strict=True)))  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="above the 24 of the adapters"):
        diagonalised(family, 25)


def test_feedback_stores_each_column_once() -> None:
    seen: list[int] = []

    def fit(block: Tensor, _root: Tensor):
        def column(j: int, values: Tensor) -> Tensor:
            seen.append(j)
            return values

        return column, 0.0

    rows = adapter().a
    stored, _ = feedback(rows, gram(), fit)
    assert torch.equal(stored, rows)
    assert seen == [*range(GROUP), *range(GROUP), *range(K - 2 * GROUP)]
