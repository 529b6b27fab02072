"""Adapters end to end: KL with them falls, the base stays, and a crash changes nothing."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lowra.compiler.errors import CaptureError
from lowra.compiler.facts import Adapter, AdapterRank, AdapterTuning, Packed
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.printer import print_program
from lowra.compiler.program import Program
from lowra.compiler.rotation import rotate
from lowra.passes import CorrectWeights, InitializeAdapters, RewriteLinears, TuneAdapters
from lowra.passes.tune_adapters import _Student
from lowra.passes.tuning import model_training
from lowra.passes.tuning.batches import held_out, split_batches, with_tensors
from lowra.passes.tuning.divergence import divergence
from tests.passes.tuned_programs import quantized, same, tuned

STEP = TuneAdapters(steps=24, batch_tokens=64, rate=0.02, check=8)
RANK = InitializeAdapters(rank=4, alpha=8.0)


@functools.cache
def adapted(name: str, rule: str = "closed-form", correct: bool = False) -> Program:
    steps = (*((CorrectWeights(rank=2),) if correct else ()), replace(RANK, rule=rule))
    return run_pipeline(quantized(name), steps)


@functools.cache
def finished(name: str, rule: str = "closed-form", correct: bool = False) -> Program:
    slow = rule == "zero"  # its B has no size of its own that a rate could be relative to
    return tuned(adapted(name, rule, correct), replace(STEP, rate=0.005) if slow else STEP)


def outcome(program: Program) -> AdapterTuning:
    return program.fact(program.sites[0].name, AdapterTuning)


@pytest.mark.parametrize(
    ("name", "rule", "correct"),
    [
        ("llama", "closed-form", False), ("gpt2", "closed-form", False), ("llama", "zero", False),
        ("llama", "closed-form", True),
    ],
)  # fmt: skip
def test_the_held_out_divergence_of_what_runs_is_the_one_reported(
    name: str, rule: str, correct: bool
) -> None:
    program = finished(name, rule, correct)
    assert outcome(program).after < outcome(program).before
    batches = split_batches(program, STEP.batch_tokens)
    student = run_pipeline(program, (RewriteLinears(),)).module()
    original = quantized(name).module()
    held = batches[len(batches) - held_out(len(batches)) :]
    with torch.no_grad():
        found = [float(divergence(student(*batch), original(*batch))) for batch in held]
    assert sum(found) / len(found) == pytest.approx(outcome(program).after, rel=1e-3)


def test_the_base_stays_and_both_factors_move() -> None:
    before, after = adapted("llama"), finished("llama")
    for site in after.sites:
        assert after.fact(site.name, Packed) is before.fact(site.name, Packed)
        old, new = (p.fact(site.name, Adapter) for p in (before, after))
        assert not torch.equal(old.lora_a, new.lora_a)
        assert not torch.equal(old.lora_b, new.lora_b)
        assert new.scaling == old.scaling == 2.0
    assert not after.replaced
    assert "adapter tuned: KL" in print_program(after)


def test_gradients_of_a_and_b_are_those_of_the_dense_product() -> None:
    program = adapted("llama")
    student, site = _Student(program), program.sites[0]
    packed, adapter = (program.fact(site.name, kind) for kind in (Packed, Adapter))
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(2, 5, size, generator=generator) for size in (site.k, site.n))
    multiply, rotation = student.linears()[site.nodes[0]]
    assert rotation.active
    (multiply(rotate(x, rotation), None) * other).sum().backward()
    a, b = (t.double().requires_grad_() for t in (adapter.lora_a, adapter.lora_b))
    weight = packed.weight.dequantize().double() + adapter.scaling * b @ a
    (functional.linear(x.double(), weight) * other).sum().backward()
    for name, start in ((f"lora_A/{site.name}", a), (f"lora_B/{site.name}", b)):
        size = start.detach().square().mean().sqrt()
        got, want = student.adam.values[name].grad, start.grad
        assert got is not None and want is not None
        assert torch.allclose(got.double(), want * size, rtol=1e-3, atol=1e-4)


def test_sites_without_an_adapter_get_none() -> None:
    first = quantized("llama").sites[0].name
    chosen = {s.name: [AdapterRank(4 * (s.name == first))] for s in quantized("llama").sites}
    program = tuned(run_pipeline(quantized("llama").with_facts(chosen), (RANK,)), STEP)
    assert [program.find(s.name, Adapter) is not None for s in program.sites].count(True) == 1
    assert outcome(program).after < outcome(program).before


def test_training_that_makes_it_worse_leaves_everything_as_it_was() -> None:
    program = tuned(adapted("llama"), replace(STEP, rate=50.0))
    assert outcome(program).after == outcome(program).before
    assert same(program, adapted("llama"))


def test_two_runs_store_the_same_bytes() -> None:
    assert same(finished("llama"), tuned(adapted("llama"), STEP))


def test_an_interrupted_run_goes_on_where_it_was_last_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = model_training.Adam.step

    def counted(self: Any, rate: float) -> None:
        nonlocal steps
        steps += 1
        if steps == 11:
            raise KeyboardInterrupt
        step(self, rate)

    monkeypatch.setattr(model_training.Adam, "step", counted)
    with pytest.raises(KeyboardInterrupt):
        tuned(adapted("llama"), STEP, tmp_path)
    resumed = tuned(adapted("llama"), STEP, tmp_path)
    assert steps == 11 + 16  # the check at step 8 was kept
    assert same(resumed, finished("llama"))


def test_another_base_or_adapter_is_trained_anew(tmp_path: Path) -> None:
    tuned(adapted("llama"), STEP, tmp_path)
    tuned(adapted("llama", "zero"), STEP, tmp_path)
    program, norm = adapted("llama"), "model.norm.weight"
    tuned(with_tensors(program, {norm: 1.1 * program.tensors[norm].detach()}), STEP, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_model_without_next_tokens_is_refused() -> None:
    with pytest.raises(CaptureError, match="next-token distribution"):
        STEP.run(quantized("mlp"))
