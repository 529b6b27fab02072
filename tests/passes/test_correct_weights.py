"""Corrections: frozen low-rank parts at few bits, exact in their count, in both views."""

from __future__ import annotations

import pytest
import torch

from lowra.compiler.correction import Correction, correction_bits
from lowra.compiler.errors import CheckpointError, RecipeError
from lowra.compiler.facts import Adapter, Packed
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import PackedWeight
from lowra.passes import (
    CorrectWeights,
    FitCodebooks,
    InitializeAdapters,
    QuantizeWeights,
)
from lowra.passes.correct_weights import stored_correction
from lowra.passes.rounding.feedback import factorize
from lowra.passes.rounding.low_rank import closed_form
from lowra.passes.rounding.moments import InputMoments
from tests.passes.site_programs import (
    CyclicWidths,
    compiled,
    compiled_afresh,
    correlated_gram,
    output_loss,
    site_program,
    two_sites,
)

PACK: tuple[Pass, ...] = (FitCodebooks((2,), -1, True), CyclicWidths(), QuantizeWeights())


def moments_of(gram: torch.Tensor) -> InputMoments:
    factor = factorize(gram)
    return InputMoments(gram + torch.eye(len(gram)) * factor.damping, factor)


@pytest.mark.parametrize(("n", "k"), [(40, 96), (96, 40)])
def test_at_eight_bits_it_is_the_closed_form(n: int, k: int) -> None:
    """In the output metric, against the float factors; 4 bits cost a little more."""
    u, v = torch.randn(n, 3) * torch.tensor([9.0, 5.0, 3.0]), torch.randn(3, k)
    error, gram = u @ v + 0.3 * torch.randn(n, k), correlated_gram(k)
    b, a = closed_form(error, gram, 3)
    least, energy = output_loss(error - b @ a, gram), output_loss(error, gram)
    left = [
        output_loss(
            error - stored_correction(error, gram, moments_of(gram), Rotation(), 3, bits).product(),
            gram,
        )
        for bits in (8, 4)
    ]
    assert least * 0.999 < left[0] < least + 0.001 * energy
    assert left[0] < left[1] < least + 0.05 * energy


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_error_falls_and_is_that_of_base_plus_correction(rotated: bool, bits: int) -> None:
    weights, grams = two_sites()
    plain = compiled(PACK, rotated)
    done = compiled((*PACK, CorrectWeights(2, bits)), rotated)
    for site in done.sites:
        before, packed = (p.fact(site.name, Packed) for p in (plain, done))
        correction = done.fact(site.name, Correction)
        left = weights[site.name] - packed.weight.dequantize() - correction.product()
        gram = grams[site.name]
        energy = output_loss(weights[site.name], gram)
        assert packed.error == pytest.approx(output_loss(left, gram) / energy, rel=1e-3)
        assert packed.error < before.error and packed.energy == before.energy
        assert correction.stored_bits() == correction_bits(site.n, site.k, 2, bits)
        assert correction.a.rotation == plain.fact(site.name, Rotation)


def test_more_rounds_never_raise_the_error() -> None:
    errors = [
        [
            done.fact(site.name, Packed).error
            for done in [compiled((*PACK, CorrectWeights(2, 4, rounds)))]
            for site in done.sites
        ]
        for rounds in range(4)
    ]
    for fewer, more in zip(errors, errors[1:], strict=False):
        assert all(b <= a for a, b in zip(fewer, more, strict=True))


def test_without_rounds_the_packed_weight_stays() -> None:
    plain, done = compiled(PACK), compiled((*PACK, CorrectWeights(2, rounds=0)))
    for site in done.sites:
        assert torch.equal(
            plain.fact(site.name, Packed).weight.codes, done.fact(site.name, Packed).weight.codes
        )


def test_adapters_start_from_what_the_correction_leaves() -> None:
    weights, grams = two_sites()
    done = compiled((*PACK, CorrectWeights(2), InitializeAdapters(3, 6.0)))
    for site in done.sites:
        packed, adapter = done.fact(site.name, Packed), done.fact(site.name, Adapter)
        base = packed.weight.dequantize() + done.fact(site.name, Correction).product()
        left = weights[site.name] - base - adapter.scaling * adapter.lora_b @ adapter.lora_a
        gram = grams[site.name]
        energy = output_loss(weights[site.name], gram)
        assert adapter.error == pytest.approx(output_loss(left, gram) / energy, rel=1e-3)
        assert adapter.error < packed.error


@pytest.mark.parametrize("rotated", [False, True])
def test_a_rank_beyond_the_weight_is_clipped_and_bits_still_exact(rotated: bool) -> None:
    done = compiled((*PACK, CorrectWeights(500, 8)), rotated)
    for site in done.sites:
        correction = done.fact(site.name, Correction)
        assert correction.rank == min(site.n, site.k)
        assert correction.stored_bits() == correction_bits(site.n, site.k, 500, 8)
        assert done.fact(site.name, Packed).error < 2e-3


@pytest.mark.parametrize("kind", ["zero weight", "one row", "one column", "zero gram"])
def test_degenerate_sites_get_finite_corrections(kind: str) -> None:
    weight, gram = torch.randn(6, 32), correlated_gram(32)
    if kind == "zero weight":
        weight = torch.zeros(6, 32)
    if kind == "one row":
        weight = weight[:1]
    if kind == "one column":
        weight, gram = weight[:, :1].contiguous(), gram[:1, :1]
    if kind == "zero gram":
        gram = torch.zeros(32, 32)
    program = site_program({"one": weight}, {"one": gram})
    done = run_pipeline(program, (*PACK, CorrectWeights(2)))
    product = done.fact("one", Correction).product()
    assert bool(torch.isfinite(product).all())
    if kind == "zero weight":
        assert not product.any()


def test_twice_gives_the_same_bits() -> None:
    first, second = (compiled_afresh((*PACK, CorrectWeights(2))) for _ in range(2))
    for site in first.sites:
        for name, factor in first.fact(site.name, Correction).factors().items():
            other = second.fact(site.name, Correction).factors()[name]
            for role, tensor in factor.tensors().items():
                assert torch.equal(tensor, other.tensors()[role])


@pytest.mark.parametrize("step", [CorrectWeights(0), CorrectWeights(-1), CorrectWeights(2, 5)])
def test_wrong_options_are_refused(step: Pass) -> None:
    with pytest.raises(RecipeError, match="correction of rank"):
        compiled_afresh((*PACK, step))


def test_factors_of_different_ranks_are_no_correction() -> None:
    a, b = (compiled(PACK).fact(name, Packed).weight for name in ("up", "down"))
    assert isinstance(a, PackedWeight) and a.n != b.n
    with pytest.raises(CheckpointError, match="ranks differ"):
        Correction(a, b)
