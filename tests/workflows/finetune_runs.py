"""Short runs of finetune on a tiny compiled model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowra.workflows.finetune import OF_DATA, Finetuned, finetune
from lowra.workflows.training_data import TrainingData
from tests.cli.conftest import letters
from tests.runtime.compiled_models import low_llama

TEXTS = ["the cat sat on the mat, and so did the dog. "[i:] for i in range(24)]
RUN: dict[str, Any] = {
    "context": 24, "batch": 4, "max_steps": 8, "rate": 2e-2, "eval_every": 2, "keep": 8,
}  # fmt: skip


def student() -> Any:
    return copy.deepcopy(low_llama().compiled)


def run(
    model: nn.Module, folder: Path, data: Any = TEXTS, tokenizer: Any = None, **changed: Any
) -> Finetuned:
    usual = {n: v for n, v in RUN.items() if not isinstance(data, TrainingData) or n not in OF_DATA}
    return finetune(model, data, folder, tokenizer=tokenizer or letters(), **(usual | changed))


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Interrupted(Exception):
    pass


def interrupted(model: nn.Module, folder: Path, step: int, **changed: Any) -> None:
    """A run that is cut at `step`."""

    def cut(entry: dict[str, Any]) -> None:
        if entry["step"] >= step:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(model, folder, tell=cut, **changed)
