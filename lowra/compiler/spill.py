"""Spill: large intermediate tensors on disk under a fingerprint, so that work survives a crash.

A file is written under a temporary name and renamed; a file that is there is whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowra.compiler.errors import OutputError
from lowra.version import __version__


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file; read on demand."""

    path: Path
    key: str

    def load(self) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:  # pyright: ignore
                return file.get_tensor(self.key)
        except (SafetensorError, OSError) as error:
            raise OutputError(f"work file {self.path} is damaged ({error}); delete it") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all. Raises OutputError when it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
        why = "the disk is full" if full else str(error)
        raise OutputError(f"cannot write {path}: {why}; free space or choose another folder") from (
            error
        )


class Spill:
    """A folder of intermediate tensors of one compile.

    With `folder` None the files live in a temporary folder and go with this object.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="lowra-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot use {folder} for work files: {error.strerror}") from error
        self.folder = folder

    @classmethod
    def closed(cls) -> Spill:
        """A spill without a folder, for a program that is done compiling."""
        spill = cls.__new__(cls)
        spill.folder = Path(os.devnull)
        return spill

    def path(self, *key: str) -> Path:
        """The file of a key; its name is a hash of every part of the key and of lowra's version."""
        digest = hashlib.sha256("\0".join((__version__, *key)).encode()).hexdigest()[:24]
        return self.folder / f"{digest}.safetensors"

    def tensors(
        self, key: tuple[str, ...], make: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors under `key`, made and written on first use."""
        path = self.path(*key)
        if path.exists():
            with contextlib.suppress(SafetensorError):  # a damaged file is made anew
                return read_tensors(path)
        made = dict(make())
        write_tensors(made, path)
        return made


def stored_names(path: Path) -> set[str]:
    """The names of the tensors of a safetensors file."""
    with safe_open(path, framework="pt") as file:  # pyright: ignore
        return set(file.keys())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:  # pyright: ignore
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
