"""How a fine-tuning run goes: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowra.compiler.errors import RecipeError, nearest
from lowra.runtime.training import ADAPTERS, check_parts
from lowra.workflows.training_data import LONG

RATES = {"adamw": 2e-4, "lora-rite": 1e-3, "oplora": 1.0}
"""Optimisers, and the rate of each where none is given."""

SCHEDULES = ("cosine", "linear", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of `finetune`; a run resumes only under equal ones.

    text_field, split: where the examples are (`read_source`). context: most tokens of a row; long:
        "pack" or "truncate". eval_share: what part of the data is held out, where no data to
        evaluate on are given.
    epochs, or max_steps where it is given: how long. batch: rows of a forward; accumulation: so
        many forwards make a step.
    optimizer: "adamw", or one that sees A and B as one product (`lowra.optim`): "lora-rite" or
        "oplora", which is not adaptive.
    rate (by default `RATES`), schedule, warmup (share of all steps), weight_decay, clip (norm of
        the gradient; 0: none): of the optimiser. With "lora-rite" and "oplora" the rate is that of
        the adapters; norms and tables go by AdamW at 2e-4, under the same schedule.
    eval_every: steps between evaluations, each with a checkpoint; by default a tenth of the run.
    patience: stop after so many evaluations in a row without a better loss; None: never.
    keep: checkpoints kept, the best beside them.
    checkpointing: recompute activations in backward in place of keeping them.
    autocast: run in bfloat16 where the model is in float32.
    train: what trains: of "adapters", "norms", "codebooks" and "scales"; None: what the model's
        recipe says.
    seed: of the order of rows, of what is held out, and of dropout.

    Raises RecipeError for a value out of range.
    """

    text_field: str | None = None
    split: str = "train"
    context: int = 512
    long: str = "pack"
    eval_share: float = 0.1
    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 4
    accumulation: int = 1
    optimizer: str = "adamw"
    rate: float = None  # pyright: ignore - never None afterwards
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int | None = None
    patience: int | None = None
    keep: int = 2
    checkpointing: bool = False
    autocast: bool = False
    train: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train is not None:
            object.__setattr__(self, "train", tuple(self.train))
            check_parts(self.train)
        if self.rate is None:
            object.__setattr__(self, "rate", RATES.get(self.optimizer, RATES["adamw"]))
        for name in ("context", "batch", "accumulation", "keep"):
            self._whole(name, 1)
        for name in ("max_steps", "eval_every", "patience"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        self._whole("seed", 0)
        self._numbers()
        self._choices()

    def _numbers(self) -> None:
        for name in ("epochs", "rate"):
            self._number(name, above=0.0)
        for name in ("weight_decay", "clip"):
            self._number(name)
        for name in ("warmup", "eval_share"):
            self._number(name, below=1.0)

    def _choices(self) -> None:
        legal_values = ("long", LONG), ("schedule", SCHEDULES), ("optimizer", tuple(RATES))
        for name, legal in legal_values:
            value = getattr(self, name)
            if value not in legal:
                raise RecipeError(f"{name}={value!r} is unknown; {nearest(str(value), legal)}")
        if self.optimizer != "adamw" and "adapters" not in (self.train or ADAPTERS):
            raise RecipeError(
                f"optimizer={self.optimizer!r} moves adapters, and train="
                f"{','.join(self.train or ())!r} names none: use adamw, or train adapters too"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingSettings:
        """Settings from their fields. Raises RecipeError for an unknown one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise RecipeError(f"training has no setting {key!r}; {nearest(key, known)}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self) | {"train": None if self.train is None else [*self.train]}

    def steps(self, rows: int) -> int:
        """Optimiser steps over `rows` rows."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, math.ceil(self.epochs * math.ceil(math.ceil(rows / self.batch)
                                                        / self.accumulation)))  # fmt: skip

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise RecipeError(f"{name}={value!r} must be a whole number of {least} or more")

    def _number(self, name: str, above: float | None = None, below: float = math.inf) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < below or (above is not None and value <= above):
            least = "above 0" if above is not None else "of 0 or more"
            most = "" if below == math.inf else f" and below {below:g}"
            raise RecipeError(f"{name}={value!r} must be a number {least}{most}")
