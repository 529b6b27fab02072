"""Gram matrices equal what hooks on the model see, however they are collected."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from lowra.backends.reference.moments import gram_of
from lowra.compiler.capture import capture
from lowra.compiler.dataflow import siblings
from lowra.compiler.errors import CalibrationError, RecipeError
from lowra.compiler.facts import Packed, Statistics
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.progress import record_stages
from lowra.compiler.spill import Spill
from lowra.passes import (
    CollectStatistics,
    FitCodebooks,
    NormalizeLinears,
    QuantizeWeights,
    RotateInputs,
    collect_statistics,
)
from tests.compiler.captured import compiled_from, normalized
from tests.models import plain_mlp, tokens
from tests.passes.site_programs import CyclicWidths

STEP = (CollectStatistics(),)


def batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """Batches of different sizes; an encoder and its decoder see different lengths."""
    found = [
        tokens(model, batch, length, seed=length) for batch, length in ((2, 9), (1, 5), (3, 7))
    ]
    for inputs in found:
        if "decoder_input_ids" in inputs:
            inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :4]
    return found


def calibrated(program: Program, model: nn.Module, folder: Path | None = None) -> Program:
    data = tuple(tuple(inputs.values()) for inputs in batches(model))
    return replace(program, calibration=data, spill=Spill(folder))


@functools.cache
def collected(name: str) -> tuple[nn.Module, Program]:
    model, program = normalized(name)
    return model, run_pipeline(calibrated(program, model), STEP)


def seen_by_hooks(model: nn.Module, program: Program) -> dict[str, Tensor]:
    """Gram float64 of every site, from hooks on its modules."""
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in program.sites}
    handles = [
        model.get_submodule(module).register_forward_pre_hook(
            lambda _, args, name=site.name: inputs[name].append(
                args[0].detach().double().flatten(0, -2)
            )
        )
        for site in program.sites
        for module in site.modules
    ]
    with torch.no_grad():
        for batch in batches(model):
            model(**batch)
    for handle in handles:
        handle.remove()
    rows = {name: torch.cat(parts) for name, parts in inputs.items()}
    return {name: x.T @ x / len(x) for name, x in rows.items()}


def assert_grams(program: Program, want: Mapping[str, Tensor]) -> None:
    for site in program.sites:
        gram = program.fact(site.name, Statistics).load(site.k)
        assert gram.dtype == torch.float32
        torch.testing.assert_close(gram.double(), want[site.name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_gram_equals_what_hooks_on_the_model_see(name: str) -> None:
    model, program = collected(name)
    assert_grams(program, seen_by_hooks(model, program))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_module_tree_collects_the_same(name: str) -> None:
    model, program = normalized(name)
    bare = replace(calibrated(program, model), graph=None, source=model)
    done = run_pipeline(bare, STEP)
    assert_grams(done, seen_by_hooks(model, done))
    assert not model.training and not any(m._forward_pre_hooks for m in model.modules())


def test_module_tree_keeps_the_training_flag() -> None:
    model = plain_mlp().train()
    program = run_pipeline(capture(model), (NormalizeLinears(),))
    run_pipeline(calibrated(program, model), STEP)
    assert model.training


def test_tokens_are_counted_and_siblings_share_one_file() -> None:
    _, program = collected("llama")
    for group in siblings(program):
        facts = {program.fact(site.name, Statistics) for site in group}
        assert len(facts) == 1 and facts.pop().tokens == 2 * 9 + 5 + 3 * 7
    assert len(list(program.spill.folder.iterdir())) == len(siblings(program))


def refuse(*_: Any) -> NoReturn:
    raise AssertionError("the model ran again")


def test_finished_statistics_are_read_and_not_collected_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, program = normalized("mlp")
    program = calibrated(program, model, tmp_path)
    first = run_pipeline(program, STEP)
    monkeypatch.setattr(collect_statistics.Runner, "run", refuse)
    again = run_pipeline(replace(program, spill=Spill(tmp_path)), STEP)
    for site in program.sites:
        assert again.fact(site.name, Statistics) == first.fact(site.name, Statistics)
    other = replace(program, calibration=program.calibration[:1])
    with pytest.raises(AssertionError, match="ran again"):
        run_pipeline(other, STEP)


def test_a_lost_file_is_collected_again_with_the_same_bytes(tmp_path: Path) -> None:
    model, program = normalized("mlp")
    program = calibrated(program, model, tmp_path)
    run_pipeline(program, STEP)
    files = sorted(tmp_path.iterdir())
    before = [path.read_bytes() for path in files]
    files[0].unlink()
    run_pipeline(program, STEP)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before


def test_statistics_stream_segment_by_segment() -> None:
    """Each segment of the graph runs once per batch."""
    advanced: list[int] = []

    class Counting(collect_statistics.Runner):
        def run(self, nodes: Any, values: Any, moments: Any) -> None:
            advanced.append(len(nodes))
            super().run(nodes, values, moments)
            assert all(isinstance(name, str) for name in values)

    model, program = normalized("llama")
    program = calibrated(program, model)
    with pytest.MonkeyPatch.context() as patch, record_stages() as stages:
        patch.setattr(collect_statistics, "Runner", Counting)
        run_pipeline(program, STEP)
    assert len(advanced) % 3 == 0 and advanced[0] == advanced[1] == advanced[2]
    assert program.graph is not None and sum(advanced[::3]) <= len(program.graph.nodes)
    assert "statistics" in stages


def test_without_calibration_the_sites_are_data_free() -> None:
    _, program = normalized("mlp")
    done = run_pipeline(program, STEP)
    for site in done.sites:
        assert done.fact(site.name, Statistics) == Statistics(None, 0)
        assert torch.equal(done.fact(site.name, Statistics).load(site.k), torch.eye(site.k))


class Log(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.log(self.up(x)))


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "module tree"])
def test_an_activation_that_is_not_finite_names_its_site(graph: bool) -> None:
    x = torch.randn(6, 8)
    program = capture(Log(), (x,) if graph else None)
    program = compiled_from(replace(program, calibration=((x,),)), (NormalizeLinears(),))
    with pytest.raises(CalibrationError, match="the input of down is not finite"):
        run_pipeline(program, STEP)


class Twice(nn.Module):
    """One linear, called on inputs of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(10 * self.same(x))


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "module tree"])
def test_a_linear_called_twice_counts_both_of_its_inputs(graph: bool) -> None:
    model, x = Twice(), torch.randn(40, 8)
    program = replace(capture(model, (x,) if graph else None), calibration=((x,),))
    done = compiled_from(program, (NormalizeLinears(), *STEP))
    with torch.no_grad():
        both = torch.cat((x, 10 * model.same(x))).double()
    gram = done.fact("same", Statistics).load(8).double()
    torch.testing.assert_close(gram, both.T @ both / 80, rtol=1e-4, atol=1e-5)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_linear_that_never_runs_is_named() -> None:
    model = Unused()
    program = replace(capture(model), calibration=((torch.randn(3, 8),),))
    with pytest.raises(CalibrationError, match="unused is never called by the model's forward"):
        compiled_from(program, (NormalizeLinears(), *STEP))


def test_float32_precision_setting_is_put_back() -> None:
    model = plain_mlp().bfloat16()
    x = torch.randn(4, 33).bfloat16()
    program = replace(capture(model, (x,)), calibration=((x,),))
    before = torch.get_float32_matmul_precision()
    done = compiled_from(program, (NormalizeLinears(), *STEP))
    assert torch.get_float32_matmul_precision() == before
    rows = x.double()
    gram = done.fact("up", Statistics).load(33)
    torch.testing.assert_close(gram.double(), rows.T @ rows / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "module tree"])
def test_the_diagonal_alone_is_stored_and_stands_for_a_diagonal_matrix(graph: bool) -> None:
    model, x = Twice(), torch.randn(40, 8)
    program = replace(capture(model, (x,) if graph else None), calibration=((x,),))
    full = compiled_from(program, (NormalizeLinears(), *STEP))
    done = compiled_from(program, (NormalizeLinears(), CollectStatistics(gram="diagonal")))
    stored = done.fact("same", Statistics).gram
    assert stored is not None and stored.load().shape == (8,)
    whole = full.fact("same", Statistics).load(8)
    torch.testing.assert_close(done.fact("same", Statistics).load(8), whole.diagonal().diag())


def test_a_program_compiles_on_diagonals_in_rotated_coordinates() -> None:
    model, x = plain_mlp(), torch.randn(200, 33)
    program = replace(capture(model, (x,)), calibration=((x,),))
    steps = (FitCodebooks((2,)), CyclicWidths(), QuantizeWeights())
    done = compiled_from(
        program, (NormalizeLinears(), RotateInputs(), CollectStatistics(gram="diagonal"), *steps)
    )
    for site in done.sites:
        assert 0 < done.fact(site.name, Packed).error < 0.3


def test_an_unknown_kind_of_gram_matrix_is_refused() -> None:
    program = normalized("llama")[1]
    with pytest.raises(RecipeError, match="gram='diag' is unknown; nearest: diagonal"):
        run_pipeline(program, (CollectStatistics(gram="diag"),))


@pytest.mark.parametrize("k", [1, 3, 4, 5, 64, 131])
def test_a_gram_matrix_in_strips_is_the_whole_product(k: int) -> None:
    rows = torch.randn(37, k, generator=torch.Generator().manual_seed(k))
    gram = gram_of(rows)
    torch.testing.assert_close(gram.double(), rows.double().T @ rows.double(), rtol=1e-4, atol=1e-4)
