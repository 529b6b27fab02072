"""finetune: LoRA on a compressed base, in transformers' Trainer, with held-out data and a report.

`run_folder` says what the work folder holds.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowra.compiler.errors import RecipeError, TrainingError
from lowra.compiler.half_products import half_products
from lowra.compiler.progress import stage
from lowra.runtime.training import base_mark, parts_of, prepare_training, start_digest
from lowra.workflows.evaluate import require_language_model
from lowra.workflows.models import vocabulary_size
from lowra.workflows.run_folder import (
    CHECKPOINTS,
    CURVE,
    REPORT,
    begin,
    finished,
    last_checkpoint,
    step_of,
)
from lowra.workflows.training_data import TrainingData, check_rows, training_data
from lowra.workflows.training_report import make_report, write_report
from lowra.workflows.training_settings import TrainingSettings

log = logging.getLogger("lowra")
OF_DATA = ("text_field", "split", "context", "long", "eval_share")
"""Settings that say how rows are made of data."""


@dataclass(frozen=True)
class Finetuned:
    """What came of a run: the report (plain JSON data) and where the files are."""

    report: dict[str, Any]
    folder: Path


def finetune(
    model: nn.Module, data: Any, work_dir: str | Path, *, tokenizer: Any,
    settings: TrainingSettings | None = None, eval_data: Any = None, restart: bool = False,
    tell: Callable[[dict[str, Any]], None] | None = None, **options: Any,
) -> Finetuned:  # fmt: skip
    """Train the adapters of a compiled model in place; `lowra.save` then writes it.

    `data`: a file, a data set of the Hub, texts or records (`read_source`), or `TrainingData`;
    `eval_data` likewise. `settings`, or its fields as keywords (`epochs=3`). A run that was
    interrupted goes on where its last checkpoint in `work_dir` was, and ends as if it had not been:
    give it the model as it was at the start, loaded anew. `restart` throws such a run away. `tell`
    takes every log entry. Where data are held out, the model ends as it was at the best evaluation.

    Raises RecipeError for settings out of range, or settings, data or a start other than those of
    the run in `work_dir`; CheckpointError for a model that is not compiled, has no adapter, or is
    not the one of that run; DataError; TrainingError for a loss that is no number (the last good
    checkpoint stays), and where accelerate is not installed.
    """
    settings = _settings(settings, options)
    if isinstance(data, TrainingData):
        _refuse_of_data(settings, eval_data)
    _require_accelerate()
    settings = dataclasses.replace(settings, train=settings.train or parts_of(model))
    counts = prepare_training(model, settings.train)
    require_language_model(model)
    folder = Path(work_dir).expanduser()
    data = _rows(model, data, tokenizer, settings, eval_data)
    _require_held_out(settings, data)
    arguments = _arguments(settings, data, folder / CHECKPOINTS)
    optimizer = _optimizer(model, settings)
    run = {
        "settings": settings.to_dict(), "data": data.digest(), "base": base_mark(model).tolist(),
        "start": start_digest(model),
    }  # fmt: skip
    begun = time.perf_counter()
    steps = settings.steps(len(data.train))
    if begin(folder, run, model, restart) and (folder / REPORT).is_file():
        return Finetuned(finished(model, folder), folder)
    last = last_checkpoint(folder / CHECKPOINTS, steps)
    arguments.eval_on_start = bool(data.held_out) and last is None
    with stage("fine-tune", steps) as bar:
        trainer = _trainer(model, data, arguments, tokenizer, settings, optimizer, bar, tell)
        if last is not None:
            bar.advance(min(steps, step_of(last)))
        with half_products(trainer.model):  # it is where it will be trained
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.eval()
    report = make_report(trainer.state, settings.to_dict(), data.facts, counts)
    report["seconds"] = time.perf_counter() - begun
    report["resumed_from"] = None if last is None else step_of(last)
    kept = trainer.state.best_model_checkpoint or last_checkpoint(folder / CHECKPOINTS)
    assert kept is not None, "training ends with a checkpoint"
    report["checkpoint"] = Path(kept).name
    _warn_if_worse(report)
    write_report(report, folder / REPORT, folder / CURVE)
    return Finetuned(report, folder)


def _warn_if_worse(report: dict[str, Any]) -> None:
    before, best = report["before"], report["best"]
    if before is not None and best["loss"] >= before["loss"]:
        log.warning(
            "training did not help: the held-out loss was %.4f before it and %.4f at best, at step "
            "%d; lower the rate, or keep the model as it was",
            before["loss"], best["loss"], best["step"],
        )  # fmt: skip


def _settings(settings: TrainingSettings | None, options: dict[str, Any]) -> TrainingSettings:
    if settings is None:
        return TrainingSettings.from_dict(options)
    return TrainingSettings.from_dict(settings.to_dict() | options) if options else settings


def _rows(
    model: nn.Module, data: Any, tokenizer: Any, settings: TrainingSettings, eval_data: Any
) -> TrainingData:
    if isinstance(data, TrainingData):
        check_rows(data, model)
        return data
    return training_data(
        data, tokenizer, model, text_field=settings.text_field, context=settings.context,
        long=settings.long, eval_source=eval_data, eval_share=settings.eval_share,
        split=settings.split, seed=settings.seed,
    )  # fmt: skip


def _refuse_of_data(settings: TrainingSettings, eval_data: Any) -> None:
    """Raise RecipeError for what says how rows are made, beside rows that are made."""
    usual = {field.name: field.default for field in dataclasses.fields(settings)}
    given = [name for name in OF_DATA if getattr(settings, name) != usual[name]]
    given += [] if eval_data is None else ["eval_data"]
    if given:
        raise RecipeError(
            f"{', '.join(given)}: TrainingData has its rows and what is held out already; leave "
            "that out, or give it to training_data"
        )


def _require_accelerate() -> None:
    from importlib.util import find_spec

    if find_spec("accelerate") is None:
        raise TrainingError("Trainer needs the package accelerate: pip install 'lowra[train]'")


def _require_held_out(settings: TrainingSettings, data: TrainingData) -> None:
    if settings.patience is not None and not data.held_out:
        raise RecipeError(
            "patience needs held-out data: give eval_share or data to evaluate on, or TrainingData "
            "with rows held out"
        )


def _arguments(settings: TrainingSettings, data: TrainingData, checkpoints: Path) -> Any:
    from transformers import TrainingArguments

    steps = settings.steps(len(data.train))
    often = min(steps, settings.eval_every or max(1, math.ceil(steps / 10)))
    evaluating = bool(data.held_out)
    return TrainingArguments(
        output_dir=str(checkpoints), max_steps=steps,
        per_device_train_batch_size=settings.batch, per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulation, learning_rate=settings.rate,
        lr_scheduler_type=settings.schedule, warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay, max_grad_norm=settings.clip, bf16=settings.autocast,
        logging_steps=max(1, min(often, 10)), logging_nan_inf_filter=False, save_steps=often,
        save_total_limit=settings.keep, eval_strategy="steps" if evaluating else "no",
        eval_steps=often if evaluating else None, load_best_model_at_end=evaluating,
        metric_for_best_model="eval_loss" if evaluating else None, greater_is_better=False,
        prediction_loss_only=True, seed=settings.seed, report_to=[],
        restore_callback_states_from_checkpoint=settings.patience is not None,
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False, dataloader_pin_memory=False,
        **_checkpointing(TrainingArguments, settings.checkpointing),
    )  # fmt: skip


def _trainer(
    model: nn.Module, data: TrainingData, arguments: Any, tokenizer: Any,
    settings: TrainingSettings, optimizer: torch.optim.Optimizer | None, bar: Any,
    tell: Callable[[dict[str, Any]], None] | None,
) -> Any:  # fmt: skip
    from transformers import EarlyStoppingCallback

    from lowra.workflows.watched_trainer import PadRows, WatchedTrainer

    callbacks: list[Any] = []
    if settings.patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=settings.patience))
    return WatchedTrainer(
        model, arguments, data_collator=PadRows(_padding(tokenizer, model)),
        train_dataset=data.train, eval_dataset=data.held_out or None, callbacks=callbacks,
        bar=bar, tell=tell or _silent, optimizers=(optimizer, None),
    )  # fmt: skip


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer | None:
    """None for AdamW, which is Trainer's own."""
    if settings.optimizer == "adamw":
        return None
    from lowra import optim

    maker = {"lora-rite": optim.LoRARite, "oplora": optim.OPLoRA}[settings.optimizer]
    return maker(model, lr=settings.rate, weight_decay=settings.weight_decay)


def _checkpointing(arguments: Any, wanted: bool) -> dict[str, Any]:
    """The option by the name that this transformers has for it."""
    if not wanted:
        return {}
    new = "activation_checkpointing"
    name = new if new in arguments.__dataclass_fields__ else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _padding(tokenizer: Any, model: nn.Module) -> int:
    """An id that the model knows: an added padding token may have no row in its embedding."""
    known = vocabulary_size(model) or math.inf
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((i for i in ids if isinstance(i, int) and 0 <= i < known), 0)


def _silent(_entry: dict[str, Any]) -> None:
    return
