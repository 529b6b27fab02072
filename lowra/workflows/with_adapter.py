"""One adapter on a compiled model for a while, applied as it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lowra.compiler.errors import AdapterError
from lowra.runtime.serving.pages import MOST_BYTES
from lowra.runtime.serving.pool import AdapterPool

ROOM = 1 << 28
"""Bytes beside twice the file's, for a basis that the file does not hold; untouched pages cost
nothing."""


@contextmanager
def with_adapter(model: nn.Module, folder: Path) -> Iterator[None]:
    """Within the block the model applies the adapter in a folder, packed or PEFT's.

    Raises AdapterError as `AdapterPool` does.
    """
    if not folder.is_dir():
        raise AdapterError(f"no adapter at {str(folder)!r}: give the folder of one")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    pool = AdapterPool(model, min(2 * size + ROOM, MOST_BYTES))
    pool.add("adapter", folder)
    with pool.use("adapter"):
        yield
