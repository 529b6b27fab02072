"""The folder in which a compile keeps finished work, so that an interrupted one resumes."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from lowra.compiler.errors import OutputError

_OURS = re.compile(r"\.?[0-9a-f]{24}\.safetensors(\.\d+)?")  # as lowra.compiler.spill names them


@contextmanager
def work_folder(
    out: Path, chosen: Path | None, note: Callable[[str], None]
) -> Generator[Path, None, None]:
    """Yield `chosen`, or `OUT.work` beside `out`, made if need be.

    After success the default folder goes (a chosen one stays, for the next compile). After a
    failure it stays if it holds work. Files that lowra did not write are never removed.
    """
    whole = out.expanduser().absolute()
    folder = chosen.expanduser() if chosen else whole.with_name(f"{whole.name}.work")
    if any(_work_files(folder)):
        note(f"finished work in {folder} is used again where it fits")
    else:
        note(f"finished work is kept in {folder}; if interrupted, run the same command again")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot use {folder} for work files: {error.strerror}") from error
    try:
        yield folder
    except BaseException:
        _remove_empty(missing)
        raise
    if chosen is None:
        for file in list(_work_files(folder)):
            file.unlink(missing_ok=True)
        _remove_empty([folder])


def _work_files(folder: Path) -> Generator[Path, None, None]:
    if folder.is_dir():
        yield from (file for file in folder.iterdir() if _OURS.fullmatch(file.name))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
