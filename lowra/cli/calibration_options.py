"""Options of commands that run calibration text through a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CalibrationOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.txt", help="Text; by default the model writes its own."),
]
CalibrationTokensOption = Annotated[
    int | None, typer.Option(help="How much text; by default as Recipe says.")
]
ContextOption = Annotated[
    int | None, typer.Option(help="Tokens per calibration window; by default as Recipe says.")
]
WorkDeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE",
        help="Where the heavy part of the work is done: cpu, cuda, cuda:1. [cpu]",
    ),
]  # fmt: skip
SeedOption = Annotated[int, typer.Option(help="Of everything that is drawn.")]
