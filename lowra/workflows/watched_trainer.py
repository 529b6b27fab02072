"""transformers' Trainer with an eye on it: bad losses stop it, and what happens is told."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lowra.compiler.errors import TrainingError
from lowra.compiler.progress import Stage

Tell = Callable[[dict[str, Any]], None]
"""Takes one entry of the log: of a step, or of an evaluation."""


def peak_bytes() -> int:
    """Most memory so far: of the GPU where there is one, else of this process; 0 if unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class WatchedTrainer(Trainer):
    """A Trainer that raises TrainingError, before the weights change, for a loss or gradient that
    is no number, and tells every log entry with tokens per second and peak memory."""

    def __init__(self, *arguments: Any, bar: Stage, tell: Tell, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tokens = 0
        self._bar, self._tell = bar, tell
        self._mark = (time.perf_counter(), 0)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Watch(self))

    def training_step(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Tensor:
        self.tokens += int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, *rest, **options)
        if not bool(torch.isfinite(loss)):
            self.stop(f"the loss is {loss.item()}")
        return loss

    def stop(self, what: str) -> None:
        """Raise TrainingError; the weights are those of the last step."""
        assert self.model is not None
        self.model.zero_grad()
        step = self.state.global_step
        raise TrainingError(
            f"{what} at step {step + 1}; the adapter is as step {step} left it, and checkpoints "
            "stay as they are: lower the rate, clip the gradient, or look at the data"
        )

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        if "loss" in logs:
            now, (then, tokens) = time.perf_counter(), self._mark
            logs["tokens_per_second"] = (self.tokens - tokens) / max(now - then, 1e-9)
            logs["peak_bytes"] = peak_bytes()
        super().log(logs, *rest, **options)
        self._mark = (time.perf_counter(), self.tokens)
        entry = {**logs, "step": self.state.global_step}
        if "loss" in logs:
            self._bar.say(
                f"loss {logs['loss']:.3f}  {logs['tokens_per_second']:,.0f} tokens/s  "
                f"{logs['peak_bytes'] / 1e9:.2f} GB"
            )
        self._tell(entry)

    def advance(self) -> None:
        self._bar.advance()


class _Watch(TrainerCallback):
    """Advances the bar, and looks at gradients before the optimiser does."""

    def __init__(self, trainer: WatchedTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.advance()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._trainer.model is not None
        named = self._trainer.model.named_parameters()
        for name, parameter in named:
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                self._trainer.stop(f"the gradient of {name} is not finite")


class PadRows:
    """Rows of `input_ids` of unequal length -> a batch of int64 tensors [rows, longest].

    Labels are the ids, and -100 where a row is padded.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.padding, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[i, : len(row["input_ids"])] = 1
        return {
            "input_ids": ids, "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }  # fmt: skip
