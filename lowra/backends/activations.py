"""In what type products on packed weights read activations: one choice for the whole process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from lowra.compiler.errors import LowraError

CHOICES = ("int16", "int8", "bfloat16", "float32")
SWITCHES = {"cpu": "LOWRA_CPU_ACTIVATIONS", "cuda": "LOWRA_GPU_ACTIVATIONS"}
DEFAULTS = {"cpu": "int16", "cuda": "bfloat16"}
"""Both by type of device, and serve until someone chooses."""

_chosen: str | None = None


def get_activations(device: str = "cpu") -> str:
    """What `set_activations` chose last, else LOWRA_CPU_ACTIVATIONS, else "int16"; for "cuda",
    LOWRA_GPU_ACTIVATIONS, else "bfloat16".

    Raises LowraError for another type of device, and where the environment names none of
    `CHOICES`.
    """
    if device not in SWITCHES:
        raise LowraError(f"{device!r} is no type of device: give {' or '.join(SWITCHES)}")
    return _checked(_chosen or os.environ.get(SWITCHES[device]) or DEFAULTS[device])


def set_activations(kind: str) -> None:
    """From now on, read bfloat16 and float16 activations as `kind` in products on packed weights.

    "int16" is 15 bits and a scale per token: nearer to the true product than a half is, and what a
    CPU does unless told otherwise. "int8" is 7 bits and a scale per token: faster, and a little
    less exact (README, Speed on a CPU, has both). "bfloat16" and "float32" convert. A CPU that
    cannot do the chosen one takes float32, as float32 activations always do.

    On a GPU "int8" and "int16" serve up to 2 tokens, with a scale per 1280 columns of a token, and
    codebooks of 2 to 4 bits and of trellis codes are rounded as well (docs/decisions/0021); all
    other activations, and any unless told otherwise, are read in the dtype that they have. A
    captured CUDA graph keeps what was chosen when it was captured.

    Raises LowraError for another kind.
    """
    global _chosen
    _chosen = _checked(kind)


@contextlib.contextmanager
def activations(kind: str | None) -> Iterator[None]:
    """`set_activations(kind)` for as long as the block runs; None changes nothing."""
    global _chosen
    before = _chosen
    if kind is not None:
        set_activations(kind)
    try:
        yield
    finally:
        _chosen = before


def _checked(kind: str) -> str:
    if kind not in CHOICES:
        raise LowraError(f"{kind!r} is no type of activations: choose {', '.join(CHOICES)}")
    return kind
