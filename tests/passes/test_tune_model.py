"""Tuning end to end: KL on data it has not seen, found again after a crash, gradients checked."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lowra.compiler.errors import CalibrationError, CaptureError
from lowra.compiler.facts import ModelTuning, Packed
from lowra.compiler.program import Program
from lowra.passes import TuneModel
from lowra.passes.tuning import model_training
from lowra.passes.tuning.divergence import divergence
from tests.passes.tuned_programs import quantized, same, tuned

STEP = TuneModel(steps=12, batch_tokens=64, rate=0.005, check=4)


@functools.cache
def finished(name: str) -> Program:
    return tuned(quantized(name), STEP)


def outcome(program: Program) -> ModelTuning:
    return program.fact(program.sites[0].name, ModelTuning)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_held_out_divergence_falls(name: str) -> None:
    found = outcome(finished(name))
    assert found.after < found.before


def test_the_divergence_reported_is_that_of_the_program_that_came_out() -> None:
    again = tuned(finished("llama"), replace(STEP, steps=1, rate=1e-9))
    assert outcome(again).before == pytest.approx(outcome(finished("llama")).after, rel=1e-3)


def test_codes_and_bits_stay_and_norms_scales_and_levels_move() -> None:
    before, after = quantized("llama"), finished("llama")
    for site in after.sites:
        old, new = (p.fact(site.name, Packed).weight for p in (before, after))
        assert torch.equal(old.codes, new.codes)
        assert not torch.equal(old.codebooks, new.codebooks)
        assert old.stored_bits() == new.stored_bits()
        assert old.scales is not None and new.scales is not None
        assert not torch.equal(old.scales, new.scales)
    assert "model.norm.weight" in after.replaced


@pytest.mark.parametrize(
    ("budget", "layout"),
    [
        (3.0, {"scale_bits": 8, "codebook_bits": 8}),
        (5.0, {"group": 16, "scale_bits": 4}),
        (7.0, {"shared": False}),
        (7.0, {"group": 0, "shared": False}),
    ],
    ids=str,
)
def test_every_layout_gets_better_and_stays_as_large(budget: float, layout: dict[str, Any]) -> None:
    before = quantized("llama", budget, **layout)
    after = tuned(before, STEP)
    assert outcome(after).after < outcome(after).before
    again = tuned(after, replace(STEP, steps=1, rate=1e-9))
    assert outcome(again).before == pytest.approx(outcome(after).after, rel=1e-3)
    for site in after.sites:
        old, new = (p.fact(site.name, Packed).weight for p in (before, after))
        assert torch.equal(old.codes, new.codes)
        assert old.stored_bits() == new.stored_bits()


def test_training_that_makes_it_worse_leaves_everything_as_it_was() -> None:
    for layout in ({}, {"scale_bits": 8, "codebook_bits": 8}):
        before = quantized("llama", 3.0, **layout)
        program = tuned(before, replace(STEP, rate=5.0))
        assert outcome(program).after == outcome(program).before
        assert same(before, program)


def test_two_runs_store_the_same_bytes() -> None:
    assert same(finished("llama"), tuned(quantized("llama"), STEP))


def test_an_interrupted_run_goes_on_where_it_was_last_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = model_training.Adam.step

    def counted(self: Any, rate: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt
        step(self, rate)

    monkeypatch.setattr(model_training.Adam, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        tuned(quantized("llama"), STEP, tmp_path)
    resumed = tuned(quantized("llama"), STEP, tmp_path)
    assert steps == 7 + 8  # the check at step 4 was kept
    assert same(resumed, finished("llama"))
    tuned(quantized("llama"), STEP, tmp_path)
    assert steps == 15
    assert not list(tmp_path.glob("*.state"))


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        ("llama", {"calibration": ()}, CalibrationError, "needs calibration data"),
        ("llama", {"graph": None}, CaptureError, "needs the traced graph"),
        ("mlp", {}, CaptureError, "next-token distribution"),
    ],
    ids=["data-free", "no graph", "no next tokens"],
)
def test_what_cannot_be_tuned_is_refused(
    name: str, change: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        STEP.run(replace(quantized(name), **change))


def test_the_divergence_and_its_gradient_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(2, 300, 17, generator=generator, requires_grad=True)
    wanted = torch.randn(2, 300, 17, generator=generator)
    (3 * divergence(found, wanted)).backward()
    got, found.grad = found.grad, None
    reference = functional.kl_div(
        found.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True
    )
    (3 * reference / 600).backward()
    assert float(divergence(found, wanted).detach()) == pytest.approx(
        float(reference.detach()) / 600
    )
    assert got is not None and found.grad is not None
    assert torch.allclose(got, found.grad, atol=1e-7)
