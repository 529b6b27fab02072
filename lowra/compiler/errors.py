"""Every error a user can meet: one class per kind of mistake.

A message says what was wrong, where, the value, and the way out. `exit_code` is what the
command line returns for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowraError(Exception):
    """Base of all errors raised on purpose by lowra."""

    exit_code = 1


class RecipeError(LowraError):
    """A recipe field is unknown, of the wrong type, or out of range."""

    exit_code = 2


class BudgetError(RecipeError):
    """The bit budget cannot be met; the message names the reachable interval."""


class PlanError(RecipeError):
    """A plan cannot be read, or is for another model; the message names what differs."""


class PatternError(RecipeError):
    """A pattern of the recipe matches no site; the message names the nearest ones."""


class CaptureError(LowraError):
    """The model could not be turned into a program."""

    exit_code = 3


class WeightError(LowraError):
    """A weight holds NaN or infinity, or has a shape that cannot be compressed."""

    exit_code = 3


class CalibrationError(LowraError):
    """Calibration data is empty, of the wrong shape, or outside the vocabulary."""

    exit_code = 4


class SolverError(LowraError):
    """The precision program has no solution, or the solver found none."""

    exit_code = 5


class PipelineError(LowraError):
    """A pass ran out of order or broke its contract; a note carries the printed program."""

    exit_code = 5


class CheckpointError(LowraError):
    """A checkpoint is missing, truncated, edited, or of another format version."""

    exit_code = 6


class OutputError(LowraError):
    """An output path exists, cannot be written, or the disk is full."""

    exit_code = 7


class DataError(LowraError):
    """Training data is missing, empty, lacks a field, or does not fit the model."""

    exit_code = 4


class TrainingError(LowraError):
    """Training cannot go on: the loss is no number any more, or what it needs is not installed."""

    exit_code = 10


class ModelError(LowraError):
    """A model named by a user cannot be found or read."""

    exit_code = 8


class AdapterError(LowraError):
    """An adapter cannot be read, or does not belong to this model; nothing was changed."""

    exit_code = 9


def is_no_room(error: BaseException) -> bool:
    """Whether a device had no memory left: torch has a class for it, libraries below it say so."""
    text = str(error)
    said = "out of memory" in text.lower() or "ALLOC_FAILED" in text
    return said or type(error).__name__ == "OutOfMemoryError"


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence naming the `known` words closest to `word`, for the end of a message."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=count, cutoff=0.4) or known[:count]
    return f"nearest: {', '.join(close)}" if close else "there is none to choose from"
