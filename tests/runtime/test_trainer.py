"""A compiled model in transformers' Trainer, unchanged: checkpoints, resume, the best model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowra
from lowra.compiler.errors import CheckpointError, RecipeError
from lowra.runtime.quantized_module import is_lora
from lowra.runtime.training import MARK, prepare_training, trainable
from tests.models import VOCAB, tiny_llama
from tests.runtime.compiled_models import SMALL, compiled_stack, low_llama

pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
]


def student() -> Any:
    return copy.deepcopy(low_llama().compiled)


def examples(count: int = 16, length: int = 12) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCAB, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model: nn.Module, out: Path, **changed: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    options: dict[str, Any] = {
        "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    data = examples()
    arguments = TrainingArguments(output_dir=str(out), **(options | changed))
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])  # pyright: ignore


BEST: dict[str, Any] = {
    "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2,
    "metric_for_best_model": "eval_loss", "greater_is_better": True,
}  # fmt: skip
"""The loss falls; asked for the greatest, Trainer takes the first evaluation for the best."""


def compared(
    make: Callable[[], nn.Module], options: dict[str, Any], folder: Path
) -> tuple[list[float], list[float]]:
    """Losses of a run with these options of the Trainer, and of one without."""
    found = []
    for name, given in (("run", options), ("plain", {})):
        run = trainer(make(), folder / name, save_strategy="no", **given)
        run.train()
        found.append(losses(run))
    return found[0], found[1]


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_a_checkpoint_holds_what_trains_and_the_mark_of_its_base(tmp_path: Path) -> None:
    model = student()
    trainer(model, tmp_path).train()
    stored = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(stored) == {*factors(model), MARK}
    assert all(torch.equal(stored[name], p) for name, p in factors(model).items())
    note = json.loads((tmp_path / "checkpoint-4" / "lowra_training.json").read_text())
    assert note["recipe"] == low_llama().compiled.lowra.recipe  # pyright: ignore
    assert not (tmp_path / "checkpoint-4" / "config.json").exists()


def test_an_interrupted_run_that_resumes_equals_one_that_was_not(tmp_path: Path) -> None:
    whole, cut = student(), student()
    trainer(whole, tmp_path / "whole").train()
    trainer(cut, tmp_path / "cut").train()
    fresh = student()
    again = trainer(fresh, tmp_path / "cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    assert again.state.global_step == 4
    for name, factor in factors(whole).items():
        assert torch.equal(factor, factors(fresh)[name]), name


def test_resuming_on_a_model_that_was_saved_and_loaded_is_resuming(tmp_path: Path) -> None:
    whole = student()
    trainer(whole, tmp_path / "run").train()
    loaded = lowra.load(lowra.save(low_llama().compiled, tmp_path / "saved"))
    again = trainer(loaded, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, factor in factors(whole).items():
        assert torch.equal(factor, factors(loaded)[name]), name


def test_resuming_warns_of_no_missing_base(tmp_path: Path, caplog: Any) -> None:
    trainer(student(), tmp_path).train()
    state = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    result = student().load_state_dict(state, strict=False)
    assert not result.missing_keys and not result.unexpected_keys


def test_the_best_model_comes_back_at_the_end(tmp_path: Path) -> None:
    model = student()
    run = trainer(model, tmp_path, **BEST)
    run.train()
    best = load_file(Path(run.state.best_model_checkpoint) / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert any(not torch.equal(best[name], last[name]) for name in factors(model))
    assert all(torch.equal(best[name], p) for name, p in factors(model).items())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True,
         "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True},
        {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=["checkpointing", "not-reentrant", "bf16", "all", "compiled"],
)  # fmt: skip
def test_options_of_the_trainer_change_the_loss_by_rounding_alone(
    options: dict[str, Any], tmp_path: Path
) -> None:
    run, plain = compared(student, options, tmp_path)
    if "gradient_accumulation_steps" not in options:
        assert run == pytest.approx(plain, abs=0.02)
    assert run[-1] < run[0] + 0.05
    assert len(run) == 4


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path: Path) -> None:
    one, other = student(), student()
    large = {"per_device_train_batch_size": 4, "save_strategy": "no"}
    small = {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer(one, tmp_path, **large).train()
    trainer(other, tmp_path, **small).train()
    for name, factor in factors(one).items():
        torch.testing.assert_close(factor, factors(other)[name], rtol=1e-3, atol=1e-4)


def test_training_state_of_another_base_is_refused(tmp_path: Path) -> None:
    trainer(student(), tmp_path).train()
    other = lowra.compile(tiny_llama(layers=1), bit_budget=3.5, **SMALL)
    again = trainer(other, tmp_path / "again")
    with pytest.raises(CheckpointError, match="another base .other recipe, other compressed"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_training_state_of_another_choice_of_what_trains_is_refused(tmp_path: Path) -> None:
    trainer(student(), tmp_path).train()
    model = student()
    prepare_training(model, ("adapters", "norms"))
    state = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    with pytest.raises(CheckpointError, match="trains in the model and not in the checkpoint"):
        model.load_state_dict(state, strict=False)


def test_whole_state_dicts_are_loaded_as_before() -> None:
    model = student()
    changed = {name: t + 1 if is_lora(name) else t for name, t in model.state_dict().items()}
    assert not model.load_state_dict(changed).missing_keys
    assert all(torch.equal(p, changed[name]) for name, p in factors(model).items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"model.norm.weight": changed["model.norm.weight"]})


def test_norms_train_where_they_are_asked_for(tmp_path: Path) -> None:
    model = student()
    report = prepare_training(model, ("adapters", "norms"))
    assert report.norms == 64 * 3
    before = cast("Any", model).model.norm.weight.clone()
    trainer(model, tmp_path).train()
    assert not torch.equal(cast("Any", model).model.norm.weight, before)
    assert "model.norm.weight" in load_file(tmp_path / "checkpoint-4" / "model.safetensors")


def test_what_trains_is_the_recipes_choice_unless_another_is_made() -> None:
    dense, example = torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.randn(4, 64)
    model = lowra.compile(
        dense, bit_budget=6, rank=4, calibration=[(example,)], example=(example,),
        train=("codebooks", "scales"),
    )  # fmt: skip
    report = prepare_training(model)
    assert report.adapters == 0 and report.codebooks > 0 and report.scales > 0
    assert prepare_training(model, ("adapters",)).codebooks == 0


def test_the_report_counts_a_packed_weight_as_its_dense_one() -> None:
    model = student()
    report = prepare_training(model)
    dense = sum(p.numel() for p in low_llama().dense.parameters())
    assert report.adapters == sum(p.numel() for p in factors(model).values())
    assert report.total == dense + report.adapters
    assert report.bytes == 4 * report.adapters
    share = 100 * report.adapters / report.total
    assert str(report) == (
        f"trainable params: {report.adapters:,} || all params: {report.total:,} || "
        f"trainable%: {share:.4f}"
    )
    assert trainable(model) == report


def test_factors_of_a_half_precision_model_train_in_float32() -> None:
    model = student().to(torch.bfloat16)
    prepare_training(model)
    assert {p.dtype for p in factors(model).values()} == {torch.float32}
    inputs = low_llama().inputs
    assert model(**inputs).logits.dtype == torch.bfloat16


def test_what_cannot_train_is_refused() -> None:
    for train in (None, ("adapters",), ("norms",)):
        with pytest.raises(CheckpointError, match="not compiled by lowra"):
            prepare_training(tiny_llama(layers=1), train)
    with pytest.raises(RecipeError, match="train='heads' is unknown"):
        prepare_training(copy.deepcopy(compiled_stack().compiled), ("heads",))
