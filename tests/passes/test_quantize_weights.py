"""Packed weights: their stated error is true, their bytes repeat, unfinished work resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from lowra.compiler.errors import CalibrationError
from lowra.compiler.facts import Codebooks, Packed, Precision
from lowra.compiler.packing import trellis_runs
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.rotation import Rotation
from lowra.compiler.spill import Spill
from lowra.passes import FitCodebooks, QuantizeWeights, quantize_weights
from lowra.passes.rounding.feedback import DAMPING
from lowra.passes.rounding.moments import output_error
from lowra.passes.rounding.quantizer import row_tables
from lowra.passes.rounding.refine import by_run
from tests.passes.site_programs import (
    CyclicWidths,
    compiled,
    compiled_afresh,
    correlated_gram,
    output_loss,
    site_program,
    two_sites,
)

KINDS = [
    (FitCodebooks((1, 1.6, 2, 3, 4), group, shared, rule), rotated)
    for rule, group, shared in [
        ("default", -1, True), ("default", -1, False), ("default", 0, False),
        ("default", 32, True), ("default", 32, False), ("paper", 32, False), ("paper", -1, False),
    ]
    for rotated in (False, True)
] + [(FitCodebooks((1, 1.6, 2, 3, 4), trellis=True), True)]  # fmt: skip
IDS = [f"{fit}{' rotated' if rotated else ''}" for fit, rotated in KINDS]


def planned(fit: Pass, rotated: bool) -> Program:
    return compiled((fit, CyclicWidths()), rotated)


@pytest.mark.parametrize(("fit", "rotated"), KINDS, ids=IDS)
@pytest.mark.parametrize("feedback", [True, False], ids=["feedback", "nearest"])
def test_error_is_the_share_of_output_energy_that_is_lost(
    fit: Pass, rotated: bool, feedback: bool
) -> None:
    weights, grams = two_sites()
    program = compiled((fit, CyclicWidths(), QuantizeWeights(feedback)), rotated)
    for site in program.sites:
        packed, weight = program.fact(site.name, Packed), weights[site.name]
        lost = output_loss(weight - packed.weight.dequantize(), grams[site.name])
        share = lost / output_loss(weight, grams[site.name])
        assert packed.error == pytest.approx(share, rel=1e-3) and 0 < packed.error < 0.5
        assert torch.equal(packed.weight.row_widths, program.fact(site.name, Precision).row_widths)
        assert packed.weight.rotation == program.fact(site.name, Rotation)


@pytest.mark.parametrize(("fit", "rotated"), KINDS, ids=IDS)
def test_feedback_lowers_the_output_error(fit: Pass, rotated: bool) -> None:
    with_it, without = (
        compiled((fit, CyclicWidths(), QuantizeWeights(on)), rotated) for on in (True, False)
    )
    for site in with_it.sites:
        assert with_it.fact(site.name, Packed).error < without.fact(site.name, Packed).error


def stored_bytes(program: Program) -> dict[str, bytes]:
    return {
        f"{site.name}.{role}": tensor.numpy().tobytes()
        for site in program.sites
        for role, tensor in program.fact(site.name, Packed).weight.tensors().items()
    }


def test_the_same_inputs_give_the_same_bytes() -> None:
    fit, rotated = KINDS[1]
    steps = (fit, CyclicWidths(), QuantizeWeights())
    first, second = (make(steps, rotated) for make in (compiled, compiled_afresh))
    assert stored_bytes(first) == stored_bytes(second)


def refuse(*_: Any) -> NoReturn:
    raise AssertionError("quantized again")


def test_finished_sites_are_read_back_and_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(*KINDS[0])
    program = replace(made, spill=Spill(tmp_path))
    first = run_pipeline(program, (QuantizeWeights(),))
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(quantize_weights, "quantize", refuse)
    again = run_pipeline(replace(program, spill=Spill(tmp_path)), (QuantizeWeights(),))
    assert stored_bytes(again) == stored_bytes(first)
    for site in program.sites:
        assert again.fact(site.name, Packed).error == first.fact(site.name, Packed).error


@pytest.mark.parametrize("what", ["option", "weights", "codebooks", "widths", "rotation"])
def test_finished_sites_of_other_inputs_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    made = planned(*KINDS[0])
    program = replace(made, spill=Spill(tmp_path))
    run_pipeline(program, (QuantizeWeights(),))
    monkeypatch.setattr(quantize_weights, "quantize", refuse)
    step = QuantizeWeights(feedback=what != "option")
    if what == "weights":
        program = replace(program, fingerprint="another")
    books, widths = program.fact("up", Codebooks), program.fact("up", Precision).row_widths
    other = {
        "codebooks": replace(books, levels={b: 2 * table for b, table in books.levels.items()}),
        "widths": Precision(widths.flip(0)),
        "rotation": Rotation(7, 16),
    }
    if what in other:
        program = program.with_facts({"up": [other[what]]})
    with pytest.raises(AssertionError, match="quantized again"):
        run_pipeline(program, (step,))


def test_an_interrupted_run_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(*KINDS[0])
    program = replace(made, spill=Spill(tmp_path))
    whole = stored_bytes(run_pipeline(planned(*KINDS[0]), (QuantizeWeights(),)))
    real, calls = quantize_weights.quantize, []

    def once(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(quantize_weights, "quantize", once)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(program, (QuantizeWeights(),))
    assert len(list(tmp_path.iterdir())) == 1
    calls.clear()
    done = run_pipeline(program, (QuantizeWeights(),))
    assert len(calls) == 1 and stored_bytes(done) == whole


def test_without_feedback_every_weight_goes_to_its_nearest_level() -> None:
    weights, _ = two_sites()
    program = run_pipeline(
        planned(FitCodebooks((1, 2, 3, 4), 32), False), (QuantizeWeights(False),)
    )
    for site in program.sites:
        widths = program.fact(site.name, Precision).row_widths
        tables, scales = row_tables(program.fact(site.name, Codebooks), widths)
        assert scales is not None
        options = tables[:, None, :] * scales.repeat_interleave(32, 1)[:, : site.k, None]
        distance = (weights[site.name].unsqueeze(2) - options).abs().amin(2)
        got = weights[site.name] - program.fact(site.name, Packed).weight.dequantize()
        torch.testing.assert_close(got.abs(), distance, rtol=1e-4, atol=1e-5)


def test_refitted_scales_never_raise_the_error() -> None:
    """Scales after feedback are the best for the codes in the damped metric, up to float16."""
    weights, grams = two_sites()
    program = run_pipeline(planned(FitCodebooks((1, 2, 3, 4)), False), (QuantizeWeights(),))
    for site in program.sites:
        value = program.fact(site.name, Packed).weight.dequantize()
        weight, gram = weights[site.name], grams[site.name]
        gram = gram + torch.eye(site.k) * DAMPING * gram.diagonal().mean()
        for row in range(site.n):
            q, w = value[row : row + 1], weight[row : row + 1]
            best = float((q @ gram * w).sum() / (q @ gram * q).sum())
            assert best == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize(
    "what", ["a zero row", "all zero", "an outlier", "a constant row", "two values"]
)
@pytest.mark.parametrize(("fit", "rotated"), KINDS, ids=IDS)
def test_odd_weights_are_packed_without_nan(fit: Pass, rotated: bool, what: str) -> None:
    weight = torch.randn(7, 64)
    if what == "all zero":
        weight.zero_()
    weight[2] = 0.0
    if what == "an outlier":
        weight[1, 5] = 500.0
    elif what == "a constant row":
        weight[1] = 0.7
    elif what == "two values":
        weight[1] = weight[1].sign()
    program = site_program({"a": weight}, {"a": correlated_gram(64)}, rotated)
    done = run_pipeline(program, (fit, CyclicWidths(), QuantizeWeights()))
    packed = done.fact("a", Packed)
    assert bool(torch.isfinite(packed.weight.dequantize()).all())
    assert 0 <= packed.error < 1.0


GRAMS: dict[str, Callable[[], Tensor]] = {
    "rank one": lambda: torch.ones(64, 64),
    "fewer tokens than columns": lambda: torch.randn(5, 64).T.cov() * 5,
    "dead inputs": lambda: correlated_gram(64) * (torch.arange(64) % 2).outer(
        torch.arange(64) % 2
    ),
    "zero": lambda: torch.zeros(64, 64),
}  # fmt: skip


@pytest.mark.parametrize("what", GRAMS)
@pytest.mark.parametrize(("fit", "rotated"), KINDS, ids=IDS)
def test_singular_gram_matrices_give_sensible_weights(fit: Pass, rotated: bool, what: str) -> None:
    torch.manual_seed(0)
    weight, gram = torch.randn(7, 64), GRAMS[what]()
    done = run_pipeline(
        site_program({"a": weight}, {"a": gram}, rotated), (fit, CyclicWidths(), QuantizeWeights())
    )
    packed = done.fact("a", Packed)
    value = packed.weight.dequantize()
    assert bool(torch.isfinite(value).all()) and 0 <= packed.error < 1.0
    assert float(value.abs().max()) < 20


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_a_gram_matrix_with_nan_is_one_error(rotated: bool) -> None:
    gram = correlated_gram(64)
    gram[3, 4] = gram[4, 3] = torch.nan
    program = site_program({"a": torch.randn(7, 64)}, {"a": gram}, rotated)
    with pytest.raises(CalibrationError, match="a Gram matrix of size 64 holds NaN"):
        run_pipeline(program, (FitCodebooks(), CyclicWidths(), QuantizeWeights()))


def test_output_error_is_the_trace() -> None:
    error, gram = torch.randn(5, 40), correlated_gram(40)
    assert output_error(error, gram) == pytest.approx(output_loss(error, gram), rel=1e-4)


@pytest.mark.parametrize(("fit", "rotated"), KINDS, ids=IDS)
def test_rounds_lower_the_error_of_every_row(fit: Pass, rotated: bool) -> None:
    """Scales and coordinate descent in turn, in the damped metric; a step is kept per row, or per
    run of trellis codes."""
    weights, grams = two_sites()
    errors = []
    for rounds in (0, 1, 3):
        program = compiled((fit, CyclicWidths(), QuantizeWeights(rounds=rounds)), rotated)
        now = []
        for name, weight in weights.items():
            gram = (
                grams[name] + torch.eye(weight.shape[1]) * DAMPING * grams[name].diagonal().mean()
            )
            lost = (weight - program.fact(name, Packed).weight.dequantize()).double()
            runs = trellis_runs(program.fact(name, Precision).row_widths)
            now.append(by_run(((lost @ gram.double()) * lost).sum(1), runs))
        errors.append(torch.cat(now))
    assert bool((errors[1] <= errors[0] * (1 + 1e-3)).all())
    assert bool((errors[2] <= errors[1] * (1 + 1e-3)).all())
    assert float(errors[2].sum()) < 0.99 * float(errors[0].sum())
