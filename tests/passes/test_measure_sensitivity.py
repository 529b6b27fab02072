"""Sensitivities equal the squared output gradients that autograd finds in the model."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from lowra.compiler.facts import Statistics
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.spill import Spill
from lowra.passes import (
    CollectStatistics,
    MeasureSensitivity,
    NormalizeLinears,
    measure_sensitivity,
)
from tests.compiler.captured import captured, normalized
from tests.models import tokens

STEPS = (CollectStatistics(), MeasureSensitivity())


def batches(model: nn.Module, sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(tuple(tokens(model, *size, seed=sum(size)).values()) for size in sizes)


def measured(
    name: str, sizes: tuple[tuple[int, int], ...] = ((2, 9), (1, 9)), folder: Path | None = None
) -> Program:
    model, program = normalized(name)
    data = batches(model, sizes)
    return run_pipeline(replace(program, calibration=data, spill=Spill(folder)), STEPS)


llama = functools.lru_cache(maxsize=None)(lambda: measured("llama"))


def seen_by_autograd(model: nn.Module, program: Program) -> dict[str, Tensor]:
    """Mean over tokens of the squared gradient of the summed loss, float64 [n] per site."""
    outputs: dict[str, list[Tensor]] = {site.name: [] for site in program.sites}

    def keep(name: str) -> Any:
        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            output.retain_grad()
            outputs[name].append(output)

        return after

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in outputs]
    count = 0
    for ids, _ in program.calibration:
        logits = model(input_ids=ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        count += ids.numel()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {
        name: torch.cat([y.grad.flatten(0, 1) for y in found]).double().square().sum(0) / count
        for name, found in outputs.items()
    }


def test_sensitivity_is_the_mean_squared_gradient_of_each_output_row() -> None:
    program = llama()
    want = seen_by_autograd(captured("llama")[0], program)
    for site in program.sites:
        stored = program.fact(site.name, Statistics).sensitivity
        assert stored is not None
        torch.testing.assert_close(stored.load().double(), want[site.name], rtol=1e-3, atol=1e-9)


def test_gram_and_tokens_stay() -> None:
    program = llama()
    plain = run_pipeline(
        replace(program, facts={}, history=("normalize-linears",)), (CollectStatistics(),)
    )
    for site in program.sites:
        fact = program.fact(site.name, Statistics)
        assert replace(fact, sensitivity=None) == plain.fact(site.name, Statistics)


def test_no_gradient_is_left_behind() -> None:
    llama()
    assert all(p.grad is None and p.requires_grad for p in captured("llama")[0].parameters())


@pytest.mark.parametrize("name", ["t5", "bert", "mlp"])
def test_programs_that_are_no_causal_language_model_are_left_as_they_are(name: str) -> None:
    program = measured(name)
    assert all(program.fact(s.name, Statistics).sensitivity is None for s in program.sites)


def test_data_free_programs_are_left_as_they_are() -> None:
    _, program = normalized("llama")
    done = run_pipeline(program, STEPS)
    assert all(done.fact(s.name, Statistics) == Statistics(None) for s in done.sites)


def refuse(*_: Any) -> NoReturn:
    raise AssertionError("measured again")


def test_finished_sensitivities_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured("llama", folder=tmp_path)
    monkeypatch.setattr(measure_sensitivity, "_mean_squares", refuse)
    again = measured("llama", folder=tmp_path)
    for site in first.sites:
        assert again.fact(site.name, Statistics) == first.fact(site.name, Statistics)
    with pytest.raises(AssertionError, match="measured again"):
        measured("llama", ((1, 8),), tmp_path)


def test_a_file_of_fewer_sites_is_not_taken_for_that_of_all(tmp_path: Path) -> None:
    model, program = captured("llama")
    program = replace(program, calibration=batches(model, ((1, 6),)), spill=Spill(tmp_path))
    run_pipeline(program, (NormalizeLinears(ignore=("*.down_proj",)), *STEPS))
    whole = run_pipeline(program, (NormalizeLinears(), *STEPS))
    for site in whole.sites:
        stored = whole.fact(site.name, Statistics).sensitivity
        assert stored is not None and stored.load().shape == (site.n,)


def test_batches_may_differ_in_length() -> None:
    program = measured("llama", ((2, 9), (1, 5)))
    assert program.fact(program.sites[0].name, Statistics).sensitivity is not None


def test_tokens_bound_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_sensitivity, "WINDOW", 4)
    _, program = normalized("llama")
    program = replace(program, calibration=batches(captured("llama")[0], ((8, 9),)))
    used = sum(window.numel() for _, window in MeasureSensitivity(tokens=16)._windows(program))
    every = [window for _, window in MeasureSensitivity(tokens=10_000)._windows(program)]
    assert 8 <= used <= 16 and all(2 <= window.shape[1] <= 4 for window in every)
    assert sum(window.numel() for window in every) == 8 * 8, "the ninth token stands alone"
