"""Every input gets the largest rotation it allows, none, or the one that a trial finds better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowra.compiler.dataflow import siblings
from lowra.compiler.errors import PipelineError, RecipeError
from lowra.compiler.facts import RotationTrial, Statistics
from lowra.compiler.pipeline import run_pipeline
from lowra.compiler.program import Program
from lowra.compiler.rotation import Rotation
from lowra.compiler.spill import Spill, StoredTensor, write_tensors
from lowra.passes import CollectStatistics, RotateInputs
from lowra.recipe import Recipe
from lowra.recipe_pipeline import rotation_of
from tests import models
from tests.compiler.captured import normalized
from tests.passes.site_programs import correlated_gram, site_program

MEASURED = RotateInputs(seed=7, rule="measured")


def normal(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(1))


def with_outliers(n: int, k: int) -> Tensor:
    """Rows whose weights have heavy tails."""
    return normal(n, k) ** 3


def two_valued(n: int, k: int) -> Tensor:
    """Rows of +- a power of two, which two levels hold exactly and a rotation spreads."""
    return torch.sign(normal(n, k)) * 2.0 ** (torch.arange(n) % 3).unsqueeze(1)


def tried(
    weight: Tensor, gram: Tensor | None = None, folder: Path | None = None,
    step: RotateInputs = MEASURED,
) -> Program:  # fmt: skip
    gram = correlated_gram(weight.shape[1]) if gram is None else gram
    return run_pipeline(site_program({"a": weight}, {"a": gram}, folder=folder), (step,))


def block_of(program: Program, name: str = "a") -> int:
    return program.fact(name, Rotation).block


def test_block_is_the_largest_power_of_two_that_divides_k() -> None:
    _, program = normalized("llama")
    done = run_pipeline(program, (RotateInputs(seed=7),))
    for site in done.sites:
        assert done.fact(site.name, Rotation) == Rotation(7, {64: 64, 96: 32}[site.k])


@pytest.mark.parametrize("step", [RotateInputs(), MEASURED], ids=["always", "measured"])
def test_siblings_rotate_alike(step: RotateInputs) -> None:
    model, program = normalized("t5")
    batch = tuple(models.tokens(model).values())
    program = replace(program, calibration=(batch,), spill=Spill())
    done = run_pipeline(program, (CollectStatistics(), step))
    for group in siblings(done):
        assert len({done.fact(site.name, Rotation) for site in group}) == 1
        trials = [done.find(site.name, RotationTrial) for site in group]
        assert trials == [trials[0]] * len(group)
        assert (trials[0] is not None) == (step is MEASURED)


def test_odd_inputs_and_a_disabled_pass_mean_no_rotation() -> None:
    _, program = normalized("mlp")
    for step in (RotateInputs(), RotateInputs(rule="never")):
        done = run_pipeline(program, (step,))
        assert not any(done.fact(site.name, Rotation).active for site in done.sites)
    _, program = normalized("llama")
    done = run_pipeline(program, (RotateInputs(seed=3, rule="never"),))
    assert {done.fact(site.name, Rotation).block for site in done.sites} == {1}


# --- measured -----------------------------------------------------------------------------------


def test_a_rotation_is_kept_where_it_loses_less() -> None:
    done = tried(with_outliers(24, 96))
    losses = done.fact("a", RotationTrial).losses
    assert done.fact("a", Rotation) == Rotation(7, 32)
    assert 0 < losses[32] < losses[1] < 1


def test_a_rotation_is_left_out_where_it_loses_more() -> None:
    done = tried(two_valued(24, 64))
    losses = done.fact("a", RotationTrial).losses
    assert block_of(done) == 1
    assert losses[1] < 1e-6 and losses[64] > 0.005


def test_on_a_tie_nothing_is_rotated() -> None:
    done = tried(torch.zeros(5, 64))
    assert done.fact("a", RotationTrial).losses == {1: 0.0, 64: 0.0}
    assert block_of(done) == 1


def test_a_trial_is_in_the_layout_that_is_stored() -> None:
    """Rows of two kinds, of four values each: a table per row holds them, a shared one does not."""
    weight = torch.tensor([-3.0, -1.0, 1.0, 8.0])[torch.arange(64) % 4] * torch.ones(6, 1)
    weight[1::2] = torch.tensor([-1.0, 0.0, 0.25, 7.0])[torch.arange(64) % 4]
    own = RotateInputs(rule="measured", group=0, shared=False)
    per_row = tried(weight, step=own).fact("a", RotationTrial).losses
    shared = tried(weight).fact("a", RotationTrial).losses
    assert per_row[1] < 1e-5 < 1e-3 < shared[1]


def test_rows_count_by_their_sensitivity() -> None:
    """Half of the rows want the rotation, half do not: those that the loss minds decide."""
    weight = torch.cat([two_valued(12, 64), with_outliers(12, 64)])
    for minded, block in ((0, 1), (1, 64)):
        program = site_program({"a": weight}, {"a": correlated_gram(64)})
        sensitivity = torch.full((24,), 1e-6)
        sensitivity[12 * minded : 12 * minded + 12] = 1.0
        stored = StoredTensor(program.spill.path("sensitivity", str(minded)), "a")
        write_tensors({"a": sensitivity}, stored.path)
        statistics = replace(program.fact("a", Statistics), sensitivity=stored)
        program = run_pipeline(program.with_facts({"a": [statistics]}), (MEASURED,))
        assert block_of(program) == block


def test_without_data_or_choice_no_trial_is_held() -> None:
    blind = run_pipeline(site_program({"a": two_valued(8, 64)}), (MEASURED,))
    assert block_of(blind) == 64 and blind.find("a", RotationTrial) is None
    odd = tried(with_outliers(8, 33))
    assert block_of(odd) == 1 and odd.find("a", RotationTrial) is None


def test_two_runs_measure_the_same() -> None:
    first, second = (tried(normal(60, 96)).fact("a", RotationTrial) for _ in range(2))
    assert first == second


def test_a_second_run_finds_the_trial_and_another_question_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tried(with_outliers(24, 96), folder=tmp_path)

    def refuse(*_: Any) -> Tensor:
        raise RecipeError("measured anew")

    monkeypatch.setattr(RotateInputs, "_try", refuse)
    again = tried(with_outliers(24, 96), folder=tmp_path)
    assert again.fact("a", RotationTrial) == first.fact("a", RotationTrial)
    with pytest.raises(RecipeError, match="anew"):
        tried(2 * with_outliers(24, 96), folder=tmp_path)
    with pytest.raises(RecipeError, match="anew"):
        tried(with_outliers(24, 96), folder=tmp_path, step=replace(MEASURED, seed=8))
    with pytest.raises(RecipeError, match="anew"):
        tried(with_outliers(24, 96), folder=tmp_path, step=replace(MEASURED, group=32))


def test_an_unknown_rule_and_missing_statistics_are_refused() -> None:
    with pytest.raises(RecipeError, match="rule='often' is not one of always, measured, never"):
        run_pipeline(normalized("mlp")[1], (RotateInputs(rule="often"),))
    with pytest.raises(PipelineError, match="has no Statistics"):
        run_pipeline(normalized("llama")[1], (MEASURED,))


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "measured"), ({"rotation": True}, "always"), ({"rotation": False}, "never"),
        ({"preset": "lowra"}, "never"), ({"preset": "lowra", "rotation": True}, "always"),
    ],
)  # fmt: skip
def test_a_recipe_measures_unless_it_is_told(options: dict[str, Any], rule: str) -> None:
    assert rotation_of(Recipe(bit_budget=2, **options)).rule == rule


def test_a_recipe_tries_the_layout_it_stores() -> None:
    step = rotation_of(Recipe(bit_budget=2, group=32, shared_codebooks=False))
    assert (step.group, step.shared) == (32, False)
