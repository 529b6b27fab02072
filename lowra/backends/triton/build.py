"""Source -> a kernel: the emitted text as a module on disk, loaded once; Triton compiles it.

Triton reads a kernel's source from a file. Files lie under `$LOWRA_HOME/kernels/triton`, named by
their content; one that holds something else is written anew. What Triton compiles out of them lies
in its own cache (TRITON_CACHE_DIR). A folder in LOWRA_TRITON_OVERRIDE may hold `<key name>.py` to
be taken in place of what is emitted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lowra.backends.triton.emit import emit
from lowra.backends.triton.keys import Key
from lowra.compiler.errors import is_no_room
from lowra.compiler.home import home_folder

log = logging.getLogger("lowra")
T = TypeVar("T")
OVERRIDE = "LOWRA_TRITON_OVERRIDE"


def source_of(key: Key) -> str:
    """What is built for `key`: the text that the user put in its place, or what is emitted."""
    folder = os.environ.get(OVERRIDE)
    if folder:
        with contextlib.suppress(FileNotFoundError):
            return (Path(folder) / f"{key.name}.py").read_text()
    return emit(key)


@functools.cache
def kernel_of(key: Key) -> Any:
    """The kernel of `key`, ready to launch; for the interpreter, one that runs in Python.

    Raises ImportError without Triton.
    """
    return load(key.name, source_of(key), interpreted=not key.target.backend)


def load(name: str, source: str, interpreted: bool = False) -> Any:
    """The kernel in `source`."""
    knobs: Any = importlib.import_module("triton.knobs")
    path = written(name, source, home_folder() / "kernels" / "triton")
    spec = importlib.util.spec_from_file_location(f"lowra_kernel_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module.kernel


def written(name: str, source: str, folder: Path) -> Path:
    """The file that holds `source`, written first where there is none or another text."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:24]
    path = folder / f"{name[:100]}-{digest}.py"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text() == source:
            return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _replace(path, source)
    except OSError:
        return _replace(Path(tempfile.mkdtemp(prefix="lowra-kernels-")) / path.name, source)


def _replace(path: Path, source: str) -> Path:
    """Written under another name, then renamed: other processes see all of it or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as scratch:
        scratch.write(source)
    Path(scratch.name).replace(path)
    return path


def compile_options(key: Key) -> dict[str, Any]:
    """What Triton is told beside the source."""
    blocks = key.blocks
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    if getattr(key, "waits", False) or getattr(key, "signals", False):
        options["launch_pdl"] = True
    return options


def anew_where_broken(compiled: Callable[[], T], kernel: Any = None) -> T:
    """What `compiled` returns; if it fails, once more with nothing taken from Triton's cache, in
    which a file may be broken. kernel: what it launches."""
    try:
        return compiled()
    except Exception as error:
        if is_no_room(error) or type(error).__name__ == "OutOfResources":
            raise
        knobs: Any = importlib.import_module("triton.knobs")
        log.info("compiling a kernel anew: %s", error)
        if kernel is not None:
            forget_unloaded(kernel)
        with knobs.compilation.scope():
            knobs.compilation.always_compile = True
            return compiled()


def forget_unloaded(kernel: Any) -> None:
    """Take what a device did not load out of the kernel's own cache, where Triton puts it before
    it loads it. What is loaded stays: graphs may hold it, and it is unloaded once it is dropped."""
    for made, *_ in kernel.device_caches.values():
        for place in [place for place, one in made.items() if one.module is None]:
            del made[place]
