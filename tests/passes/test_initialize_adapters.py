"""Adapters stand for what quantization lost, as well as their rank allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowra.compiler.facts import Adapter, Packed
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.program import Program
from lowra.passes import FitCodebooks, InitializeAdapters, QuantizeWeights
from lowra.passes.rounding.feedback import DAMPING
from lowra.passes.rounding.low_rank import closed_form
from tests.passes.site_programs import (
    CyclicWidths,
    compiled,
    correlated_gram,
    output_loss,
    site_program,
    two_sites,
)

DATA_FREE_FITS = [
    FitCodebooks((2,), -1, True), FitCodebooks((2,), -1, False), FitCodebooks((2,), 0, False),
    FitCodebooks((2,), 32, True), FitCodebooks((2,), 32, False),
    FitCodebooks((2,), 32, False, "paper"), FitCodebooks((2,), -1, False, "paper"),
    FitCodebooks((2,), -1, True, trellis=True),
]  # fmt: skip


def adapted(step: Pass, fit: Pass = DATA_FREE_FITS[0], feedback: bool = True) -> Program:
    return compiled((fit, CyclicWidths(), QuantizeWeights(feedback), step))


def product(adapter: Adapter) -> Tensor:
    return adapter.scaling * adapter.lora_b.double() @ adapter.lora_a.double()


def best_product(error: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, float]:
    """The rank-r minimum of tr((E - M) G (E - M)') by a dense float64 SVD of E G^1/2."""
    values, vectors = torch.linalg.eigh(gram.double())
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    u, s, vh = torch.linalg.svd(error.double() @ root, full_matrices=False)
    m = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    return m, float(s[rank:].square().sum())


@pytest.mark.parametrize(("n", "k"), [(10, 24), (24, 10), (16, 16), (1, 8), (8, 1)])
@pytest.mark.parametrize("rank", [1, 3])
def test_closed_form_is_the_optimum_of_a_dense_svd(n: int, k: int, rank: int) -> None:
    rank = min(rank, n, k)
    error, gram = torch.randn(n, k), correlated_gram(k)
    damped = gram + torch.eye(k) * DAMPING * gram.diagonal().mean()
    b, a = closed_form(error, gram, rank)
    assert b.shape == (n, rank) and a.shape == (rank, k) and b.dtype == a.dtype == torch.float32
    best, lost = best_product(error, damped, rank)
    torch.testing.assert_close(b.double() @ a.double(), best, rtol=1e-4, atol=1e-4)
    assert output_loss(error - b @ a, damped) == pytest.approx(lost, rel=1e-4, abs=1e-4)


def test_without_data_the_closed_form_is_the_plain_svd() -> None:
    error = torch.randn(9, 14)
    b, a = closed_form(error, torch.eye(14), 4)
    u, s, vh = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(b @ a, (u[:, :4] * s[:4]) @ vh[:4], rtol=1e-4, atol=1e-4)


def test_input_metric_beats_the_plain_svd_on_outputs() -> None:
    error, gram = torch.randn(20, 30), correlated_gram(30)
    losses = [
        output_loss(error - b @ a, gram)
        for b, a in (closed_form(error, gram, 3), closed_form(error, torch.eye(30), 3))
    ]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("what", ["zero error", "rank one", "zero gram", "singular gram"])
@pytest.mark.parametrize(("n", "k"), [(6, 12), (12, 6)])
def test_degenerate_errors_have_finite_factors(n: int, k: int, what: str) -> None:
    error, gram = torch.randn(n, k), correlated_gram(k)
    if what == "zero error":
        error = torch.zeros(n, k)
    if what == "rank one":
        error = torch.outer(torch.randn(n), torch.randn(k))
    if what == "zero gram":
        gram = torch.zeros(k, k)
    if what == "singular gram":
        gram = torch.ones(k, k)
    b, a = closed_form(error, gram, 4)
    assert bool(torch.isfinite(b).all()) and bool(torch.isfinite(a).all())
    if what in ("zero error", "rank one"):
        torch.testing.assert_close(b @ a, error, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fit", [DATA_FREE_FITS[0], DATA_FREE_FITS[-1]], ids=str)
@pytest.mark.parametrize("rule", ["closed-form", "two-sided", "alternate", "loftq", "zero"])
def test_errors_stated_are_those_of_base_and_base_plus_adapter(rule: str, fit: Pass) -> None:
    weights, grams = two_sites()
    program = adapted(InitializeAdapters(3, 8.0, rule), fit)
    for site in program.sites:
        weight, gram = weights[site.name].double(), grams[site.name]
        base = program.fact(site.name, Packed)
        adapter = program.fact(site.name, Adapter)
        residual, energy = weight - base.weight.dequantize().double(), output_loss(weight, gram)
        assert adapter.scaling == pytest.approx(8.0 / 3)
        assert base.error == pytest.approx(output_loss(residual, gram) / energy, rel=1e-3)
        left = output_loss(residual - product(adapter), gram) / energy
        assert adapter.error == pytest.approx(left, rel=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 16.0])
def test_closed_form_lowers_the_output_error_whatever_the_scaling(alpha: float) -> None:
    program = adapted(InitializeAdapters(4, alpha))
    plain = compiled((DATA_FREE_FITS[0], CyclicWidths(), QuantizeWeights()))
    for site in program.sites:
        base, adapter = program.fact(site.name, Packed), program.fact(site.name, Adapter)
        assert base.error == pytest.approx(plain.fact(site.name, Packed).error)
        assert adapter.error < base.error and adapter.rank == 4


def weight_residual(program: Program, name: str, with_adapter: bool) -> float:
    residual = two_sites()[0][name].double() - program.fact(name, Packed).weight.dequantize()
    if with_adapter:
        residual = residual - product(program.fact(name, Adapter))
    return float(residual.square().sum())


@pytest.mark.parametrize("fit", DATA_FREE_FITS, ids=str)
def test_loftq_lowers_the_weight_residual(fit: Pass) -> None:
    """Also against one SVD of the residual, which is what its first round gives."""
    rounds = adapted(InitializeAdapters(4, rule="loftq"), fit, feedback=False)
    once = adapted(InitializeAdapters(4, rule="loftq", iterations=1), fit, feedback=False)
    plain = compiled((fit, CyclicWidths(), QuantizeWeights(feedback=False)))
    for site in plain.sites:
        before = weight_residual(plain, site.name, with_adapter=False)
        first = weight_residual(once, site.name, with_adapter=True)
        after = weight_residual(rounds, site.name, with_adapter=True)
        assert first < before
        assert after < 1.1 * first, f"{site.name}: {after / first:.2f} times one SVD"


def test_zero_start_adds_nothing_and_is_seeded() -> None:
    first, again = (adapted(InitializeAdapters(4, rule="zero", seed=3)) for _ in range(2))
    other = adapted(InitializeAdapters(4, rule="zero", seed=9))
    for site in first.sites:
        adapter = first.fact(site.name, Adapter)
        assert not adapter.lora_b.any() and bool(adapter.lora_a.any())
        assert adapter.error == pytest.approx(first.fact(site.name, Packed).error, rel=1e-6)
        assert torch.equal(adapter.lora_a, again.fact(site.name, Adapter).lora_a)
        assert not torch.equal(adapter.lora_a, other.fact(site.name, Adapter).lora_a)
    up, down = (first.fact(name, Adapter).lora_a for name in ("up", "down"))
    assert not torch.equal(up[:, :48], down[:, :48])


@pytest.mark.parametrize("rule", ["closed-form", "two-sided", "alternate", "loftq", "zero"])
def test_a_rank_larger_than_the_weight_is_clipped(rule: str) -> None:
    program = adapted(InitializeAdapters(500, 250.0, rule))
    for site in program.sites:
        adapter = program.fact(site.name, Adapter)
        assert adapter.rank == min(site.n, site.k) and adapter.scaling == 0.5
        assert adapter.lora_a.shape == (adapter.rank, site.k)
        if rule == "closed-form":  # full rank takes up the whole residual
            assert adapter.error < 1e-6


def test_starting_twice_gives_the_same_bits() -> None:
    program = compiled((DATA_FREE_FITS[0], CyclicWidths(), QuantizeWeights()))
    for rule in ("closed-form", "alternate", "loftq"):
        step = InitializeAdapters(3, rule=rule)
        first, second = (run_pipeline(program, (step,)) for _ in range(2))
        for site in first.sites:
            a, b = (p.fact(site.name, Adapter) for p in (first, second))
            assert torch.equal(a.lora_a, b.lora_a) and torch.equal(a.lora_b, b.lora_b)


def test_the_packed_weight_stays_as_it_was_without_loftq() -> None:
    program = compiled((DATA_FREE_FITS[0], CyclicWidths(), QuantizeWeights()))
    done = run_pipeline(program, (InitializeAdapters(3),))
    for site in program.sites:
        assert done.fact(site.name, Packed).weight is program.fact(site.name, Packed).weight


@pytest.mark.parametrize("fit", DATA_FREE_FITS[:5], ids=str)
def test_alternating_lowers_the_error_with_adapter_and_states_that_of_the_base(fit: Pass) -> None:
    """Never above the closed form alone, in the input metric; the base alone may get worse."""
    once = adapted(InitializeAdapters(4), fit)
    errors = [adapted(InitializeAdapters(4, rule="alternate", rounds=r), fit) for r in (0, 1, 3)]
    weights, grams = two_sites()
    for site in once.sites:
        found = [p.fact(site.name, Adapter).error for p in (once, *errors)]
        assert found[1] == pytest.approx(found[0])
        assert found == sorted(found, reverse=True) and found[3] < found[0]
        packed = errors[-1].fact(site.name, Packed)
        left = weights[site.name].double() - packed.weight.dequantize()
        assert packed.error * packed.energy == pytest.approx(
            output_loss(left, grams[site.name]), rel=1e-3
        )


@pytest.mark.parametrize("rule", ["closed-form", "alternate"])
def test_a_data_free_program_gets_adapters_in_plain_weight_norm(rule: str) -> None:
    weight = torch.randn(10, 32)
    program = run_pipeline(
        site_program({"one": weight}),
        (DATA_FREE_FITS[0], CyclicWidths(), QuantizeWeights(), InitializeAdapters(2, rule=rule)),
    )
    adapter, packed = program.fact("one", Adapter), program.fact("one", Packed)
    left = weight - packed.weight.dequantize() - product(adapter)
    relative = float(left.square().sum() / weight.double().square().sum())
    assert adapter.error == pytest.approx(relative, rel=1e-3) and adapter.error < packed.error


def test_a_weight_that_is_stored_exactly_gets_an_adapter_of_zeros() -> None:
    program = run_pipeline(
        site_program({"one": torch.zeros(6, 32)}, {"one": correlated_gram(32)}),
        (
            DATA_FREE_FITS[0],
            CyclicWidths(),
            QuantizeWeights(),
            InitializeAdapters(2, rule="alternate"),
        ),
    )
    adapter = program.fact("one", Adapter)
    assert not product(adapter).any() and adapter.error == 0.0
