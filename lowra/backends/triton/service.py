"""Whether GPU kernels serve a device, and what happens when one cannot be built or launched."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from lowra.backends.triton.targets import Target, cuda_target, hip_target
from lowra.compiler.errors import is_no_room

log = logging.getLogger("lowra")
T = TypeVar("T")
SWITCH = "LOWRA_GPU_KERNELS"
"""These kernels serve unless it is "off"."""


@functools.cache
def target_of(device: torch.device) -> Target | None:
    """What kernels for `device` are written for; None, said once, where there are none."""
    if os.environ.get(SWITCH) == "off":
        return explain(f"{SWITCH} is off")
    if importlib.util.find_spec("triton") is None:
        return explain("Triton is not installed: pip install 'lowra[triton]'")
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(device).gcnArchName)
        return hip_target(name) or explain(f"there are none for {name}")
    major, minor = torch.cuda.get_device_capability(device)
    need = "compute capability 8.0 or more is needed"
    return cuda_target(major, minor) or explain(f"{device} has {major}.{minor}; {need}")


@functools.cache
def explain(why: str) -> None:
    """Say once why plain torch serves."""
    log.warning("running without GPU kernels, several times slower: %s", why)


failures: list[str] = []
"""Why a kernel could not be built or launched: from then on plain torch serves."""


def serve(device: torch.device, kernels: Callable[[Target], T], reference: Callable[[], T]) -> T:
    """What the kernels for `device` give, where there are some that work; else plain torch."""
    target = target_of(device)
    if target is None or failures:
        return reference()
    return served(target, lambda: kernels(target), reference)


def served(target: Target, kernels: Callable[[], T], reference: Callable[[], T]) -> T:
    """What the kernels give; where one cannot be built or launched, what plain torch gives.

    No room raises as it does anywhere, and so does the interpreter's target.
    """
    try:
        return kernels()
    except Exception as error:
        if not target.backend or is_no_room(error):
            raise
        failures.append(f"{type(error).__name__}: {error}")
        log.debug("a GPU kernel failed", exc_info=True)
        first = (str(error).splitlines() or [""])[0][:200]
        explain(
            f"one failed to build or to launch ({type(error).__name__}: {first}); update the "
            f"driver and Triton, or set {SWITCH}=off"
        )
        return reference()
