"""transformers' Trainer with an eye on it: it stops at what is no number, and tells of the rest."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lowra.compiler.errors import TrainingError
from lowra.compiler.progress import Stage
from lowra.workflows.run_folder import last_checkpoint

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
    """A Trainer that raises TrainingError for what is no number, and tells every log entry with
    tokens per second and peak memory.

    A loss or gradient stops it before the weights change, a held-out loss or a trained weight
    before a checkpoint is written: what checkpoints there are, are good.
    """

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
        step = self.state.global_step + 1
        if not bool(torch.isfinite(loss)):
            self._stop(f"the loss is {loss.item()} at step {step}")
        if self.accelerator.sync_gradients:  # Trainer clips next, and makes of one NaN all NaN
            named = ((name, p.grad) for name, p in self._trained())
            odd = _not_finite((name, grad) for name, grad in named if grad is not None)
            if odd is not None:
                self._stop(f"the gradient of {odd} is not finite at step {step}")
        return loss

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        found = super().evaluate(*arguments, **options)
        if not math.isfinite(found["eval_loss"]):
            step = self.state.global_step
            self._stop(f"the held-out loss is {found['eval_loss']} after step {step}")
        return found

    def check_weights(self) -> None:
        """Raise TrainingError where a step has ruined what trains."""
        odd = _not_finite(self._trained())
        if odd is not None:
            self._stop(f"{odd} is not finite after step {self.state.global_step}")

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        assert self.model is not None
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _stop(self, what: str) -> None:
        """Raise TrainingError; the weights are those of the last step."""
        assert self.model is not None
        self.model.zero_grad()
        last = last_checkpoint(Path(str(self.args.output_dir)))
        kept, go_on = "no checkpoint was written", ""
        if last is not None:
            kept = f"{last} is the last good checkpoint"
            go_on = "; docs/guide-finetuning.md says how to go on from a checkpoint"
        raise TrainingError(
            f"{what}; the adapter is as step {self.state.global_step} left it, and {kept}: look at "
            f"the data, or begin anew in another work folder with a lower rate or clip{go_on}"
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
    """Advances the bar, and looks at the weights before a checkpoint is written."""

    def __init__(self, trainer: WatchedTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.advance()
        if control.should_save:
            self._trainer.check_weights()


def _not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first name of a tensor that holds NaN or infinity. A GPU is waited for once."""
    names, good = [], []
    for name, tensor in named:
        names.append(name)
        good.append(tensor.isfinite().all())
    found = torch.stack([one.to(good[0].device) for one in good]).tolist() if good else []
    return next((name for name, finite in zip(names, found, strict=True) if not finite), None)


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
