"""C++ source -> a loaded library: the system's compiler, a cache on disk, ctypes.

A library is kept under a key of its source, the compiler, the flags and this CPU, so a cache that
came from another machine is never run. Without a compiler nothing is built, and the caller falls
back to plain torch; why is said once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from lowra.compiler.home import home_folder

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-Wno-psabi")
"""Without the note that vectors wider than the CPU's are passed otherwise by older compilers: no
function that takes one is called from outside."""
NATIVE = ("-march=native",)
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_SECONDS = 300
SWITCH = "LOWRA_CPU_KERNELS"
log = logging.getLogger("lowra")


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The library of sources/<name>.cpp, built on first use; None where it cannot be."""
    return built(name, source_of(name), NATIVE)


def built(name: str, source: str, options: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library of `source`, from the cache or built; None where it cannot be."""
    if os.environ.get(SWITCH) == "off":
        return None
    compiler = find_compiler()
    if compiler is None:
        _explain("no C++ compiler was found; install g++ or clang++, or name one in CXX")
        return None
    try:
        return load(source, name, compiler, home_folder() / "kernels", options)
    except (OSError, subprocess.SubprocessError) as error:
        _explain(str(error))
        return None


_explained: list[str] = []


def _explain(why: str) -> None:
    """Say once per process why there are no kernels."""
    if not _explained:
        log.warning("compiling without fast CPU kernels, several times slower: %s", why)
    _explained.append(why)


PARTS = {"codes": ("codes/block.h", "codes/paths.h")}
"""What stands before a library's own file, where that is long."""


def source_of(name: str) -> str:
    """The whole C++ text of a library: what all share, then its own files."""
    folder = resources.files("lowra.backends.cpu") / "sources"
    files = ("parallel.h", "vectors.h", *PARTS.get(name, ()), f"{name}.cpp")
    return "".join((folder / file).read_text() for file in files)


def find_compiler() -> Path | None:
    """`$CXX`, or the first known C++ compiler on the path."""
    for name in (os.environ.get("CXX"), *COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return Path(found).resolve()
    return None


def load(
    source: str, name: str, compiler: Path, folder: Path, options: tuple[str, ...] = NATIVE
) -> ctypes.CDLL:
    """The library of `source`, from `folder` or built into it. Raises OSError when neither works,
    or SubprocessError when the compiler hangs.

    A file that does not load is built anew; a folder that cannot be written is replaced by a
    temporary one.
    """
    path = folder / f"{name}-{_key(source, compiler, options)}.so"
    if path.exists():
        with contextlib.suppress(OSError):
            return _open(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        build(source, compiler, path, options)
    except PermissionError:
        path = Path(tempfile.mkdtemp(prefix="lowra-kernels-")) / path.name
        build(source, compiler, path, options)
    return _open(path)


def _open(path: Path) -> ctypes.CDLL:
    """A library, its loops on the threads that torch has."""
    library = ctypes.CDLL(str(path))
    if hasattr(library, "lowra_use_pool"):
        library.lowra_use_pool(ctypes.c_void_p(_fork_of_torch()))
    return library


@functools.lru_cache(maxsize=1)
def _fork_of_torch() -> int | None:
    """The address of GOMP_parallel in the libgomp that torch brought along and has loaded; None
    where torch runs on something else, and kernels start threads of their own."""
    for file in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        with contextlib.suppress(OSError, AttributeError):
            loaded = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(loaded.GOMP_parallel, ctypes.c_void_p).value
    return None


def build(source: str, compiler: Path, path: Path, options: tuple[str, ...] = NATIVE) -> None:
    """Compile under a temporary name, then rename: other processes see all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
        text, library_file = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.so"
        text.write_text(source)
        command = [str(compiler), *FLAGS, *options, str(text), "-o", str(library_file)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        if done.returncode:
            report = path.with_suffix(".log")
            report.write_text(f"{' '.join(command)}\n{done.stderr}")
            raise OSError(f"{compiler.name} failed; what it said is in {report}")
        library_file.replace(path)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """The address of a contiguous tensor, for a kernel; the caller keeps the tensor alive."""
    return ctypes.c_void_p(tensor.data_ptr())


def _key(source: str, compiler: Path, options: tuple[str, ...] = NATIVE) -> str:
    stat = compiler.stat()
    told = (*FLAGS, *options)
    parts = (source, str(compiler), str(stat.st_size), str(stat.st_mtime_ns), *told, cpu_model())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


@functools.lru_cache(maxsize=1)
def cpu_model() -> str:
    """What tells this CPU's instruction set from another's."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        fixed = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        return "\n".join(line for line in lines if line.startswith(fixed))
    return f"{platform.machine()} {platform.processor()}"


def cpu_flags() -> frozenset[str]:
    """The instruction sets this CPU reports; empty where the system does not tell."""
    for line in cpu_model().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
