"""The folder where lowra keeps what can be made again: downloads and built kernels."""

from __future__ import annotations

import os
from pathlib import Path


def home_folder() -> Path:
    """`$LOWRA_HOME`, or else `~/.cache/lowra`."""
    return Path(os.environ.get("LOWRA_HOME") or "~/.cache/lowra").expanduser()
