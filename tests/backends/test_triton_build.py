"""A kernel that Triton's cache holds broken is compiled anew, whenever it is met."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowra.backends.triton import build, launch, service
from lowra.backends.triton.keys import RotateKey
from lowra.backends.triton.targets import TARGETS

triton = pytest.importorskip("triton", reason="Triton is not installed: lowra[triton]")
BROKEN = "Triton Error [CUDA]: device kernel image is invalid"


class OutOfResources(Exception):
    """As Triton calls it."""


class Kernel:
    """As a JITFunction: one compiled kernel per specialisation, kept before it is loaded. A file
    of its cache on disk is broken until something is compiled in spite of it."""

    def __init__(self, error: Exception) -> None:
        self.device_caches: Any = defaultdict(lambda: ({}, {}))
        self.error, self.broken, self.launched, self.compiled = error, {1, 8}, 0, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._run

    def _run(self, tensor: torch.Tensor) -> None:
        alignment = tensor.element_size()
        made, _ = self.device_caches[0]
        if alignment not in made:
            self.compiled += 1
            if triton.knobs.compilation.always_compile:
                self.broken.discard(alignment)
            made[alignment] = SimpleNamespace(module=None, good=alignment not in self.broken)
        if not made[alignment].good:
            raise self.error
        made[alignment].module = "loaded"
        self.launched += 1


def launcher_of(kernel: Kernel) -> launch.Launcher:
    key = RotateKey(TARGETS[1], "bfloat16", 2, back=False)
    return launch.Launcher(key, key.name, kernel, ("x",), {})


def tensor(alignment: int) -> torch.Tensor:
    return torch.empty(1, dtype=torch.int8 if alignment == 1 else torch.int64)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "failures", {})


def test_a_broken_binary_is_rebuilt_for_every_specialisation() -> None:
    """Also after others have run, and without a loaded one being dropped, which unloads it."""
    kernel = Kernel(RuntimeError(BROKEN))
    run = launcher_of(kernel)
    launch.run(run, (1, 1, 1), {"x": tensor(8)})
    first = kernel.device_caches[0][0][8]
    for alignment in (1, 8, 1):
        launch.run(run, (1, 1, 1), {"x": tensor(alignment)})
    assert (kernel.launched, kernel.compiled) == (4, 4)
    assert kernel.device_caches[0][0][8] is first
    assert not triton.knobs.compilation.always_compile


def test_what_does_not_fit_is_not_compiled_again() -> None:
    kernel = Kernel(OutOfResources("shared memory"))
    with pytest.raises(service.KernelError, match="rotate-sm90.*OutOfResources: shared memory"):
        launch.run(launcher_of(kernel), (1, 1, 1), {"x": tensor(1)})
    assert kernel.compiled == 1


def test_triton_keeps_kernels_where_they_are_looked_for() -> None:
    """What the stand-in above takes for granted of a JITFunction, and of what it keeps."""
    key = RotateKey(TARGETS[1], "bfloat16", 2, back=False)
    kernel = build.kernel_of(key)
    assert isinstance(kernel.device_caches, defaultdict)
    kernel.device_caches[0] = ({1: SimpleNamespace(module=None), 2: SimpleNamespace(module=3)}, {})
    build.forget_unloaded(kernel)
    assert list(kernel.device_caches.pop(0)[0]) == [2]
    source = triton.compiler.compiler.CompiledKernel.__init__.__code__.co_names
    assert "module" in source
