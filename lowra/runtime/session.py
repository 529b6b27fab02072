"""Session: runs the compressed graph of a model. No KV cache yet: every call sees whole inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lowra.compiler.capture import capture
from lowra.compiler.errors import CaptureError
from lowra.compiler.program import Program
from lowra.runtime.checkpoint import load_checkpoint
from lowra.runtime.compiled import compiled


def program_of(model: nn.Module) -> Program:
    """The compressed program of a compiled model; captured again for a loaded one.

    Raises CaptureError when the model has no dataflow graph.
    """
    info = compiled(model)
    program = None if info is None else info.program
    if program is None:
        program = capture(model)
    if program.graph is None:
        raise CaptureError(f"{type(model).__name__} has no graph to run: {program.warning}")
    return program


class Session:
    """Calls the program view of a compiled model, or of a checkpoint folder.

    The factors of the adapter are those of the model at the time the session was made.
    """

    def __init__(self, model: nn.Module | str | Path) -> None:
        if not isinstance(model, nn.Module):
            model = load_checkpoint(model)
        self.program = program_of(model)
        self.module = self.program.module()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The model's first output (logits), for inputs in order or by name.

        A missing `attention_mask` is all ones.
        """
        values = dict(zip(self.program.inputs, inputs, strict=False)) | named
        if "attention_mask" in self.program.inputs and "attention_mask" not in values:
            values["attention_mask"] = torch.ones_like(values["input_ids"])
        missing = [name for name in self.program.inputs if name not in values]
        unknown = [name for name in values if name not in self.program.inputs]
        if missing or unknown:
            raise CaptureError(
                f"this program takes {', '.join(self.program.inputs)}; "
                f"missing {missing or 'none'}, unknown {unknown or 'none'}"
            )
        return self.module(*(values[name] for name in self.program.inputs))

    def generate(self, input_ids: Tensor, *, max_new_tokens: int) -> Tensor:
        """Greedy continuation: int64 [batch, length] -> [batch, length + max_new_tokens]."""
        ids = input_ids
        for _ in range(max_new_tokens):
            following = self(input_ids=ids)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, following), dim=1)
        return ids
