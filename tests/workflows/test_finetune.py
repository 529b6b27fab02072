"""finetune: the loss falls, and a cut run equals a whole one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from lowra.compiler.errors import RecipeError
from lowra.optim.pairs import OTHERS_RATE
from lowra.workflows.training_report import loss_curve
from lowra.workflows.training_settings import TrainingSettings
from tests.cli.conftest import letters
from tests.workflows.finetune_runs import factors, interrupted, run, student

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


def test_each_optimizer_has_a_rate_of_its_own() -> None:
    assert TrainingSettings().rate == 2e-4
    assert TrainingSettings(optimizer="lora-rite").rate == 1e-3
    assert TrainingSettings(optimizer="oplora", rate=0.5).rate == 0.5
    with pytest.raises(RecipeError, match="optimizer='lorarite' is unknown.*lora-rite"):
        TrainingSettings(optimizer="lorarite")


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


@pytest.mark.parametrize(
    "options",
    [{"checkpointing": True}, {"autocast": True}, {"accumulation": 2},
     {"train": ("adapters", "norms", "codebooks", "scales")},
     {"long": "truncate"}],
)  # fmt: skip
def test_every_way_to_train_lowers_the_loss(options: dict[str, Any], tmp_path: Path) -> None:
    report = run(student(), tmp_path, **options).report
    assert report["best"]["loss"] < report["before"]["loss"]


def test_a_curve_of_one_point_or_none_is_a_picture_too() -> None:
    for train, held_out in (([], []), ([(1.0, 2.0)], []), ([(1.0, float("nan"))], [(0.0, 3.0)])):
        picture = loss_curve(train, held_out)
        ElementTree.fromstring(picture)
        assert "nan" not in picture


def test_beside_adapters_norms_train_at_a_rate_of_their_own(tmp_path: Path) -> None:
    """With an optimiser of adapters, `rate` is that of A and B alone, as the guide says."""
    how = {"optimizer": "lora-rite", "train": ("adapters", "norms"), "max_steps": 2, "clip": 0}
    start, slow, fast = student(), student(), student()
    for name, model, rate in (("slow", slow, 1e-30), ("fast", fast, 1e-2)):
        run(model, tmp_path / name, rate=rate, eval_share=0, **how)
    moved = [(m.model.norm.weight - start.model.norm.weight).abs().max() for m in (slow, fast)]
    assert all(0 < move < 2.1 * OTHERS_RATE for move in moved)
    name = "model.layers.0.mlp.up_proj"
    factor = start.get_submodule(name).lora_B
    assert torch.equal(slow.get_submodule(name).lora_B, factor)
    assert not torch.equal(fast.get_submodule(name).lora_B, factor)


def test_a_padding_token_outside_the_vocabulary_is_not_used(tmp_path: Path) -> None:
    plain, padded = letters(), letters()
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert padded.pad_token_id == student().config.vocab_size
    rows = ["the cat"[:i] for i in (3, 5, 7)] * 4
    one, other = (
        run(student(), tmp_path / name, rows, tokenizer, long="truncate", max_steps=2).report
        for name, tokenizer in (("plain", plain), ("padded", padded))
    )
    assert one["evaluations"] == other["evaluations"]


def test_a_run_trains_what_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student()
    monkeypatch.setitem(model.lowra.recipe, "train", ["adapters", "norms"])  # copies share it
    report = run(model, tmp_path / "own", max_steps=2).report
    assert report["settings"]["train"] == ["adapters", "norms"]
    assert report["trainable"]["norms"] > 0
    report = run(student(), tmp_path / "given", max_steps=2, train=("adapters",)).report
    assert report["trainable"]["norms"] == 0
