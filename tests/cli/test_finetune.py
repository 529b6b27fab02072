"""lowra finetune: from a compressed folder and a file to a folder that is better on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lowra.cli.finetune import FIELDS
from lowra.workflows.training_settings import TrainingSettings

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")

RUN = ["--context", 24, "--batch", 4, "--max-steps", 4, "--rate", 0.02, "--eval-every", 2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    rows = ({"body": "the cat sat on the mat, and so did the dog. "[i:]} for i in range(24))
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_finetune_trains_writes_and_reports(lowra: Any, checkpoint: Path, data: Path) -> None:
    out = data.parent / "out"
    done = lowra.json("finetune", checkpoint, out, "--data", data, "--text-field", "body", *RUN)
    assert done["best"]["loss"] < done["before"]["loss"]
    assert (out / "lowra.json").is_file()
    work = data.parent / "out.training"
    assert {"report.json", "loss.svg", "finetune.json"} <= {p.name for p in work.iterdir()}
    text = lowra("finetune", checkpoint, out, "--data", data, "--text-field", "body", *RUN,
                 "--overwrite")  # fmt: skip
    assert text.exit_code == 0, text.output
    assert "examples are packed" in text.stderr and "held-out data" in text.stdout
    scored = lowra.json("eval", out, "--windows", 1, "--context", 32)
    assert scored["perplexity"] > 0


def test_every_setting_is_an_option() -> None:
    assert {*FIELDS, "train"} == {field.name for field in dataclasses.fields(TrainingSettings)}


def test_finetune_refuses_by_name(lowra: Any, checkpoint: Path, dense: Path, data: Path) -> None:
    out = data.parent / "out"
    found = lowra.json("finetune", checkpoint, out, "--data", data, *RUN, code=4)
    assert "no field 'messages' or 'text'; it has 'body'" in found["error"]
    found = lowra.json("finetune", dense, out, "--data", data, *RUN, code=6)
    assert "is not compressed: run lowra compile" in found["error"]
    found = lowra.json("finetune", checkpoint, out, "--data", data, "--rate", 0, code=2)
    assert "rate=0" in found["error"]
    found = lowra.json("finetune", checkpoint, out, "--data", data, "--schedule", "cos", code=2)
    assert "schedule='cos' is unknown; nearest: cosine" in found["error"]
    assert not out.exists()


def test_adapter_options_of_a_compile_are_the_recipes_fields(
    lowra: Any, dense: Path, no_graph: None
) -> None:
    recipe = lowra.json(
        "plan", dense, "--bits", 5, "--alpha", 32, "--target", "*.q_proj", "--target", "*.v_proj",
        "--rank-pattern", "*.v_proj=8", "--rslora", "--lora-dropout", 0.1,
        "--train", "adapters, norms",
    )["recipe"]  # fmt: skip
    assert recipe["targets"] == ["*.q_proj", "*.v_proj"]
    assert (recipe["rank_pattern"], recipe["alpha"]) == ({"*.v_proj": 8}, 32)
    assert (recipe["rslora"], recipe["lora_dropout"]) == (True, 0.1)
    assert recipe["train"] == ["adapters", "norms"]
