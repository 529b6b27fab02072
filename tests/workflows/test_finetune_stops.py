"""finetune stops: at the step that goes wrong, and where the loss gets no better."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowra
from lowra.compiler.errors import TrainingError
from lowra.workflows.training_report import make_report, write_report
from tests.workflows.finetune_runs import factors, run, student

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


def poisoned(step: int) -> Any:
    """A student whose loss is no number in the forward of this step."""
    model, seen = student(), []

    def poison(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if module.training:
            seen.append(1)
        return output * float("nan") if module.training and len(seen) >= step else output

    model.lm_head.register_forward_hook(poison)
    return model


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_change(tmp_path: Path) -> None:
    model = poisoned(step=13)
    with pytest.raises(TrainingError, match="the loss is nan at step 13; .* as step 12 left"):
        run(model, tmp_path, eval_share=0, max_steps=20)
    kept = load_file(tmp_path / "checkpoints" / "checkpoint-12" / "model.safetensors")
    assert factors(model)
    for name, factor in factors(model).items():
        assert torch.equal(factor, kept[name]), name


def test_a_gradient_that_is_no_number_stops_the_run_too(tmp_path: Path) -> None:
    model = student()
    before = {name: p.clone() for name, p in factors(model).items()}
    name = list(before)[-1]  # clipping makes NaN of all others, too
    model.get_parameter(name).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match=f"gradient of {name} is not finite at step 1;"):
        run(model, tmp_path, accumulation=2)
    assert all(torch.equal(p, before[name]) for name, p in factors(model).items())


def test_weights_that_a_step_ruins_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"lora_\w is not finite after step 1; .*no checkpoint"):
        run(student(), tmp_path, max_steps=1, rate=1e39, warmup=0)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "report.json").exists()


def test_the_checkpoint_before_a_ruinous_step_is_kept_and_named(tmp_path: Path) -> None:
    """The first step of a warm-up has the rate 0."""
    how = {"eval_share": 0, "eval_every": 1, "max_steps": 4, "warmup": 0.5, "rate": 1e39}
    with pytest.raises(TrainingError, match=r"is not finite after step 2; .*checkpoint-1 is the"):
        run(student(), tmp_path, **how)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]


def ruined_at(model: Any, step: int) -> Any:
    """Makes weights NaN behind a step, in front of its evaluation."""

    def ruin(entry: dict[str, Any]) -> None:
        if entry["step"] == step and "loss" in entry:
            model.lm_head.weight.data.fill_(float("nan"))

    return ruin


def test_a_held_out_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = student()
    with pytest.raises(TrainingError, match="the held-out loss is nan after step 4; .*nt-2 is the"):
        run(model, tmp_path, tell=ruined_at(model, 4))
    assert not (tmp_path / "report.json").exists()


def test_the_ways_out_that_a_stop_names_work(tmp_path: Path) -> None:
    """To go on from the named checkpoint, or to begin anew, at another rate in another folder."""
    with pytest.raises(TrainingError) as stopped:
        run(poisoned(step=5), tmp_path / "bad")
    said = str(stopped.value)
    assert "another work folder" in said and "docs/guide-finetuning.md" in said
    checkpoint = Path(said[said.index(str(tmp_path)) :].split(" is the last")[0])
    assert checkpoint.name == "checkpoint-4"
    model = student()
    lowra.prepare_training(model)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    on = run(model, tmp_path / "on", rate=1e-3).report
    anew = run(student(), tmp_path / "anew", rate=1e-3).report
    assert on["before"]["loss"] < anew["before"]["loss"]
    assert checkpoint.is_dir()


def test_a_report_is_json_whatever_the_losses_are(tmp_path: Path) -> None:
    state = SimpleNamespace(
        global_step=1, max_steps=1, epoch=1.0, log_history=[
            {"step": 1, "loss": 800.0, "grad_norm": float("inf")}, {"step": 1, "eval_loss": 800.0},
        ],
    )  # fmt: skip
    report = make_report(state, {}, {}, lowra.trainable(student()))
    assert report["best"] == {"step": 1, "loss": 800.0, "perplexity": None}
    assert report["curve"][0]["gradient_norm"] is None
    write_report(report, tmp_path / "report.json", tmp_path / "loss.svg")
    refuse = {"parse_constant": lambda word: pytest.fail(f"{word} is no JSON")}
    assert json.loads((tmp_path / "report.json").read_text(), **refuse) == report


def test_early_stopping_stops_where_the_loss_gets_no_better(tmp_path: Path) -> None:
    """At a rate that moves nothing, the evaluation of step 2 stays the best."""
    report = run(student(), tmp_path, rate=1e-30, max_steps=40, patience=2).report
    assert len({e["loss"] for e in report["evaluations"]}) == 1
    assert report["stopped_early"] and report["steps"] == 6
    assert report["best"]["step"] == 2


@pytest.mark.parametrize("helped", [True, False])
def test_a_run_that_did_not_help_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, helped: bool
) -> None:
    model = student()

    def spoil(entry: dict[str, Any]) -> None:
        if entry["step"] == 2 and "loss" in entry and not helped:
            model.lm_head.weight.data.mul_(-30)

    report = run(model, tmp_path, tell=spoil).report
    assert (report["best"]["loss"] < report["before"]["loss"]) == helped
    assert ("training did not help: the held-out loss was" in caplog.text) != helped
