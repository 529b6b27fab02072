"""finetune refuses what cannot be trained, and another run in the folder of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lowra
from lowra.compiler.errors import CheckpointError, DataError, OutputError, RecipeError
from lowra.runtime.modules import QuantizedLinear
from lowra.workflows.training_data import TrainingData
from lowra.workflows.training_settings import TrainingSettings
from tests.models import tiny_llama
from tests.runtime.compiled_models import SMALL
from tests.workflows.finetune_runs import TEXTS, interrupted, run, student

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


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


@pytest.mark.parametrize("what", ["lora_B", "norm.weight", "scaling", "dropout"])
def test_another_start_on_the_same_base_is_another_run(what: str, tmp_path: Path) -> None:
    """As where a second stage is trained from what the first one wrote."""
    run(student(), tmp_path)
    second = student()
    if what in ("scaling", "dropout"):
        layer = next(m for m in second.modules() if isinstance(m, QuantizedLinear))
        setattr(layer, what, 0.125)
    else:
        changed = next(p for name, p in second.named_parameters() if name.endswith(what))
        changed.data[0] += 1
    with pytest.raises(RecipeError, match="began with other adapters .*load the model"):
        run(second, tmp_path)
    report = run(second, tmp_path, restart=True, tell=(told := []).append).report
    assert told and report["resumed_from"] is None


@pytest.mark.parametrize(
    ("train", "held_out", "said"),
    [
        ([], [], "the training data has no row"),
        ([[1, 2], [3]], [], "row 1 of train has 1 tokens: give rows of 2 to 128"),
        ([[1] * 129], [], "row 0 of train has 129 tokens"),
        (
            [[1, 2], [3, 500]],
            [],
            "row 1 of train holds the token id 500, outside the model's 0..12",
        ),
        ([[1, 2]], [[1, -2]], "row 0 of held_out holds the token id -2"),
    ],
)
def test_rows_that_do_not_fit_the_model_are_refused(
    train: list[list[int]], held_out: list[list[int]], said: str, tmp_path: Path
) -> None:
    rows = ([{"input_ids": ids} for ids in part] for part in (train, held_out))
    with pytest.raises(DataError, match=said):
        run(student(), tmp_path, TrainingData(*rows))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"context": 64}, {"eval_share": 0.2}, {"eval_data": TEXTS}, {"split": "test"}]
)
def test_how_to_make_rows_that_are_made_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    data = TrainingData([{"input_ids": [1, 2, 3]}], [])
    with pytest.raises(RecipeError, match=f"{next(iter(options))}: TrainingData has its rows"):
        run(student(), tmp_path, data, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patience": 2, "eval_share": 0}, "patience needs held-out data"),
        ({"optimizer": "lora-rite", "train": ("norms",)}, "optimizer='lora-rite' moves adapters"),
        ({"optimizer": "oplora", "train": ("scales",)}, "oplora.* and train='scales' names none"),
    ],
)
def test_what_is_refused_leaves_the_work_folder_as_it_was(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    new, cut = tmp_path / "new", tmp_path / "cut"
    with pytest.raises(RecipeError, match=said):
        run(student(), new, **options)
    assert not new.exists()
    interrupted(student(), cut, 5)
    with pytest.raises(RecipeError, match=said):
        run(student(), cut, restart=True, **options)
    assert run(student(), cut).report["resumed_from"] == 4
