"""The text that a program is calibrated on: what was given, or what the model writes itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowra.compiler.errors import CalibrationError
from lowra.compiler.program import Program
from lowra.recipe import Recipe
from lowra.workflows.calibration import as_token_batches
from lowra.workflows.generated_calibration import generate_calibration
from lowra.workflows.models import vocabulary_size

BATCH_TOKENS = 4096
HELD_OUT_TOKENS = 1024
"""Calibration tokens that no pass learns from: what a plan is compared with uniform widths on."""
HOLD_OUT_ONE_IN = 8
"""Of fewer windows than this, none is held out."""
log = logging.getLogger("lowra")


def calibrated(
    program: Program, model: nn.Module, recipe: Recipe, calibration: Any, tokenizer: Any
) -> Program:
    """The program with its calibration batches; without any where it runs data-free.

    calibration, tokenizer: as in `lowra.compile`. Raises CalibrationError for what cannot be used.
    """
    if recipe.data_free:
        if calibration is not None:
            raise CalibrationError("preset 'lowra' is data-free: leave calibration out")
        return program
    if "input_ids" not in program.inputs:
        return replace(program, calibration=_plain_batches(program, calibration))
    if calibration is None:
        try:
            ids = generate_calibration(
                model, tokens=recipe.calibration_tokens + _extra(recipe), context=recipe.context,
                seed=recipe.seed,
            )  # fmt: skip
        except CalibrationError as error:
            log.warning("compiling data-free: %s", error)
            return program
    else:
        ids = as_token_batches(
            calibration, tokenizer, vocabulary_size(model) or 0,
            tokens=recipe.calibration_tokens, context=recipe.context,
        )  # fmt: skip
    count = min(len(ids) // HOLD_OUT_ONE_IN, max(1, HELD_OUT_TOKENS // ids.shape[1]))
    learned, held_out = ids[: len(ids) - count], ids[len(ids) - count :]
    return replace(
        program,
        calibration=_token_batches(program, learned),
        held_out=_token_batches(program, held_out) if count else (),
    )


def _extra(recipe: Recipe) -> int:
    """Tokens to write for holding out, where there is enough text to hold some out."""
    plenty = recipe.calibration_tokens >= HOLD_OUT_ONE_IN * HELD_OUT_TOKENS
    return HELD_OUT_TOKENS if plenty else 0


def _token_batches(program: Program, ids: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    batches = ids.split(max(1, BATCH_TOKENS // ids.shape[1]))
    return tuple(_token_batch(program, batch) for batch in batches)


def _token_batch(program: Program, ids: Tensor) -> tuple[Tensor, ...]:
    values = {"attention_mask": torch.ones_like(ids)}
    return tuple(values.get(name, ids) for name in program.inputs)


def _plain_batches(program: Program, calibration: Any) -> tuple[tuple[Tensor, ...], ...]:
    """Calibration of a model without token inputs: tuples of input tensors, or bare tensors."""
    if calibration is None:
        return (program.example,) if program.example else ()
    if isinstance(calibration, (str, Path)):
        raise CalibrationError("this model takes no tokens: calibrate with tuples of input tensors")
    if not isinstance(calibration, (Tensor, Iterable)):
        raise CalibrationError(f"calibration is a {type(calibration).__name__}, not tensors")
    items = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    batches = [(item,) if isinstance(item, Tensor) else tuple(item) for item in items]
    if not batches:
        raise CalibrationError("calibration is empty; give at least one batch of input tensors")
    for batch in batches:
        if not all(isinstance(tensor, Tensor) and tensor.numel() for tensor in batch):
            raise CalibrationError("each calibration batch must be non-empty tensors, in order")
        if program.inputs and len(batch) != len(program.inputs):
            raise CalibrationError(
                f"a calibration batch has {len(batch)} tensors; the model takes "
                f"{len(program.inputs)}: {', '.join(program.inputs)}"
            )
        for got, like in zip(batch, program.example, strict=False):
            if got.dtype != like.dtype or got.shape[-1] != like.shape[-1]:
                raise CalibrationError(
                    f"a calibration tensor is {got.dtype} {list(got.shape)}; the model was traced "
                    f"with {like.dtype} {list(like.shape)}, whose last axis must agree"
                )
    return tuple(tuple(tensor.cpu() for tensor in batch) for batch in batches)
