"""finetune: the loss falls, a cut run equals a whole one, bad runs stop and name the step."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lowra
from lowra.compiler.errors import CheckpointError, OutputError, RecipeError, TrainingError
from lowra.workflows.finetune import Finetuned, finetune
from lowra.workflows.training_report import loss_curve
from lowra.workflows.training_settings import TrainingSettings
from tests.cli.conftest import letters
from tests.models import tiny_llama
from tests.runtime.compiled_models import SMALL, low_llama

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")

TEXTS = ["the cat sat on the mat, and so did the dog. "[i:] for i in range(24)]
RUN: dict[str, Any] = {
    "context": 24, "batch": 4, "max_steps": 8, "rate": 2e-2, "eval_every": 2, "keep": 8,
}  # fmt: skip


def test_each_optimizer_has_a_rate_of_its_own() -> None:
    assert TrainingSettings().rate == 2e-4
    assert TrainingSettings(optimizer="lora-rite").rate == 1e-3
    assert TrainingSettings(optimizer="oplora", rate=0.5).rate == 0.5
    with pytest.raises(RecipeError, match="optimizer='lorarite' is unknown.*lora-rite"):
        TrainingSettings(optimizer="lorarite")


def student() -> Any:
    return copy.deepcopy(low_llama().compiled)


def run(model: nn.Module, folder: Path, data: Any = TEXTS, **changed: Any) -> Finetuned:
    return finetune(model, data, folder, tokenizer=letters(), **(RUN | changed))


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_the_held_out_loss_falls_and_the_report_says_how(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    done = run(student(), tmp_path, tell=told.append)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == done.report
    assert report["best"]["loss"] < report["before"]["loss"]
    assert [e["step"] for e in report["evaluations"]] == [0, 2, 4, 6, 8]
    assert [e["step"] for e in report["curve"]] == [2, 4, 6, 8]
    assert all(e["tokens_per_second"] > 0 and e["peak_bytes"] > 0 for e in report["curve"])
    assert report["trainable"]["adapters"] == sum(p.numel() for p in factors(student()).values())
    assert report["settings"]["rate"] == 2e-2
    assert {entry["step"] for entry in told} >= {0, 2, 8}
    ElementTree.fromstring((tmp_path / "loss.svg").read_text())


@pytest.mark.usefixtures("no_half_instructions")
def test_training_runs_within_half_products(tmp_path: Path) -> None:
    model, depths = student(), []
    model.register_forward_hook(lambda *_: depths.append(torch._C._len_torch_dispatch_stack()))
    run(model, tmp_path, max_steps=2)
    assert set(depths) == {1}


class Interrupted(Exception):
    pass


def interrupted(model: nn.Module, folder: Path, step: int, **changed: Any) -> None:
    def cut(entry: dict[str, Any]) -> None:
        if entry["step"] >= step:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(model, folder, tell=cut, **changed)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 2e-2), ("lora-rite", 1e-2),
                                                 ("oplora", 1.0)])  # fmt: skip
def test_a_run_that_was_cut_and_goes_on_equals_one_that_was_not(
    optimizer: str, rate: float, tmp_path: Path
) -> None:
    whole, fresh = student(), student()
    how = {"optimizer": optimizer, "rate": rate}
    expected = run(whole, tmp_path / "whole", max_steps=8, epochs=1.0, **how).report
    interrupted(student(), tmp_path / "cut", 5, **how)
    done = run(fresh, tmp_path / "cut", **how).report
    assert done["best"]["loss"] < done["before"]["loss"]
    assert done["resumed_from"] == 4
    assert factors(whole)
    for name, factor in factors(whole).items():
        assert torch.equal(factor, factors(fresh)[name]), name
    assert done["evaluations"] == expected["evaluations"]
    assert [e["loss"] for e in done["curve"]] == [e["loss"] for e in expected["curve"]]


def test_a_run_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    first, again = student(), student()
    before = run(first, tmp_path).report
    assert run(again, tmp_path, tell=lambda _: pytest.fail("it trained")).report == before
    for name, factor in factors(first).items():
        assert torch.equal(factor, factors(again)[name]), name


def test_resuming_with_other_settings_data_or_base_is_refused(tmp_path: Path) -> None:
    interrupted(student(), tmp_path, 5)
    with pytest.raises(RecipeError, match=r"rate was 0.02, now 0.01"):
        run(student(), tmp_path, rate=1e-2)
    with pytest.raises(RecipeError, match="other data"):
        run(student(), tmp_path, TEXTS[1:])
    other = lowra.compile(tiny_llama(layers=1), bit_budget=3.5, **SMALL)
    with pytest.raises(CheckpointError, match="belongs to another base"):
        run(other, tmp_path)
    assert run(student(), tmp_path, rate=1e-2, restart=True).report["resumed_from"] is None


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_change(tmp_path: Path) -> None:
    model = student()
    seen: list[int] = []

    def poison(module: nn.Module, inputs: Any, output: Any) -> Any:
        seen.append(1)
        return output * float("nan") if module.training and len(seen) > 12 else output

    model.lm_head.register_forward_hook(poison)
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+; .* as step \d+ left"):
        run(model, tmp_path, eval_share=0, eval_every=2, max_steps=20)
    assert all(bool(p.isfinite().all()) for p in factors(model).values())
    assert list((tmp_path / "checkpoints").glob("checkpoint-*/trainer_state.json"))


def test_a_gradient_that_is_no_number_stops_the_run_too(tmp_path: Path) -> None:
    model = student()
    before = {name: p.clone() for name, p in factors(model).items()}
    factor = next(p for n, p in model.named_parameters() if n.endswith("lora_B"))
    factor.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="gradient of .*lora_B is not finite at step 1"):
        run(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in factors(model).items())


def test_early_stopping_stops_where_the_loss_gets_no_better(tmp_path: Path) -> None:
    report = run(student(), tmp_path, rate=1e-9, warmup=0.9, max_steps=40, patience=2).report
    assert report["stopped_early"] and report["steps"] < 40
    with pytest.raises(RecipeError, match="patience needs held-out data"):
        run(student(), tmp_path / "other", patience=2, eval_share=0)


@pytest.mark.parametrize(
    "options",
    [{"checkpointing": True}, {"autocast": True}, {"accumulation": 2},
     {"train": ("adapters", "norms", "codebooks", "scales")},
     {"long": "truncate"}],
)  # fmt: skip
def test_every_way_to_train_lowers_the_loss(options: dict[str, Any], tmp_path: Path) -> None:
    report = run(student(), tmp_path, **options).report
    assert report["best"]["loss"] < report["before"]["loss"]


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not compiled by lowra"):
        run(tiny_llama(layers=1), tmp_path)
    bare = lowra.compile(tiny_llama(layers=1), bit_budget=3, **(SMALL | {"rank": 0}))
    with pytest.raises(CheckpointError, match="no adapter to train"):
        run(bare, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(OutputError, match="not of a run of lowra"):
        run(student(), tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rate": 0}, "rate=0 must be a number above 0"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"batch": 0}, "batch=0 must be a whole number of 1 or more"),
        ({"patience": True}, "patience=True"),
        ({"eval_share": 1}, "eval_share=1 must be a number of 0 or more and below 1"),
        ({"schedule": "cosin"}, "nearest: cosine"),
        ({"train": ("adapters", "norm")}, "nearest: norms"),
        ({"lr": 1}, "no setting 'lr'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        TrainingSettings.from_dict(options)


def test_a_curve_of_one_point_or_none_is_a_picture_too() -> None:
    for train, held_out in (([], []), ([(1.0, 2.0)], []), ([(1.0, float("nan"))], [(0.0, 3.0)])):
        picture = loss_curve(train, held_out)
        ElementTree.fromstring(picture)
        assert "nan" not in picture


def test_a_run_trains_what_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student()
    monkeypatch.setitem(model.lowra.recipe, "train", ["adapters", "norms"])  # copies share it
    report = run(model, tmp_path / "own", max_steps=2).report
    assert report["settings"]["train"] == ["adapters", "norms"]
    assert report["trainable"]["norms"] > 0
    report = run(student(), tmp_path / "given", max_steps=2, train=("adapters",)).report
    assert report["trainable"]["norms"] == 0
