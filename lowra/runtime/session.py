"""Session: runs the compressed graph of a model. No KV cache yet: every call sees whole inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lowra.compiler.capture import Inputs, capture
from lowra.compiler.errors import CaptureError
from lowra.compiler.program import Program
from lowra.runtime.checkpoint_reader import load_checkpoint
from lowra.runtime.compiled import compiled


def program_of(model: nn.Module, example: Inputs | tuple[Tensor, ...] | None = None) -> Program:
    """The compressed program of a compiled model; captured again for a loaded one, which needs an
    `example` (as in `lowra.compile`) where it is no text model of transformers.

    Raises CaptureError when the model has no dataflow graph.
    """
    info = compiled(model)
    program = None if info is None else info.program
    if program is not None and _moved(model, program):
        program, example = None, example or _example_of(program)
    program = capture(model, example) if program is None else _with_tensors_of(model, program)
    if program.graph is not None:
        return program
    loaded = info is not None and info.program is None and example is None
    way_out = "; checkpoints keep no inputs: pass example=" if loaded else ""
    raise CaptureError(f"{type(model).__name__} has no graph to run: {program.warning}{way_out}")


def _example_of(program: Program) -> Inputs | tuple[Tensor, ...] | None:
    """The inputs that a program was traced with, as they were given: in order, or by name."""
    if program.inputs[:1] == ("input_0",):
        return program.example
    return dict(zip(program.inputs, program.example, strict=True)) or None


def _moved(model: nn.Module, program: Program) -> bool:
    """Whether the model has gone to another device since the program was made: its graph may name
    the old one."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return any(
        name in named and named[name].device != tensor.device
        for name, tensor in program.tensors.items()
    )


def _with_tensors_of(model: nn.Module, program: Program) -> Program:
    """The program with the model's tensors as they are now, shared."""
    named = (model.named_parameters, model.named_buffers)
    now = {name: t.detach() for of in named for name, t in of(remove_duplicate=False)}
    return replace(
        program, tensors={name: now.get(name, tensor) for name, tensor in program.tensors.items()}
    )


class Session:
    """Calls the program view of a compiled model, or of a checkpoint folder.

    It shares the model's tensors as long as they are updated in place, as optimizers do. `example`:
    inputs by name or in order, as in `lowra.compile`, for a model that was loaded and is no text
    model of transformers.
    """

    def __init__(
        self, model: nn.Module | str | Path,
        example: Inputs | tuple[Tensor, ...] | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            model = load_checkpoint(model)
        self.program = program_of(model, example)
        self.module = self.program.module()

    @torch.no_grad()
    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The model's first output (logits), for inputs in order or by name.

        A missing `attention_mask` is all ones.
        """
        if len(inputs) > len(self.program.inputs):
            raise CaptureError(f"this program takes {', '.join(self.program.inputs)} and no more")
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
