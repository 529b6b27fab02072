"""Whether GPU kernels serve a device, and what happens when one cannot be built or launched."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from lowra.backends.triton.keys import Key
from lowra.backends.triton.targets import Target, cuda_target, hip_target
from lowra.compiler.errors import LowraError, is_no_room

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


failures: dict[str, str] = {}
"""By the name of a kernel, why it could not be built or launched: from then on another way serves
in its place, and every other kernel goes on."""


class KernelError(LowraError):
    """A kernel could not be built or launched."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"GPU kernel {name}: {why}")
        self.name, self.why = name, why


def failed(key: Key, error: Exception) -> Exception:
    """What to raise for an error of a kernel. No room is none of its faults, and raises as it does
    anywhere; so does what the interpreter raises."""
    if not key.target.backend or is_no_room(error):
        return error
    first = (str(error).splitlines() or [""])[0][:200]
    return KernelError(key.name, f"{type(error).__name__}: {first}")


def refuse_failed(name: str) -> None:
    """Raises KernelError for a kernel in whose place another way serves."""
    if name in failures:
        raise KernelError(name, failures[name])


def replace_from_now(error: KernelError) -> None:
    """Remember that this kernel is not to be tried again, and say so once for each cause."""
    if error.name not in failures:
        log.debug("%s", error, exc_info=error)
        failures[error.name] = error.why
        _say_failed(error.why)


@functools.cache
def _say_failed(why: str) -> None:
    log.warning(
        "a GPU kernel failed to build or to launch (%s); what serves in its place is slower: "
        "update the driver and Triton, or set %s=off", why, SWITCH,
    )  # fmt: skip


def serve(device: torch.device, kernels: Callable[[Target], T], reference: Callable[[], T]) -> T:
    """What the kernels for `device` give, where there are some that work; else plain torch."""
    target = target_of(device)
    return reference() if target is None else served(lambda: kernels(target), reference)


def served(kernels: Callable[[], T], reference: Callable[[], T]) -> T:
    """What the kernels give; where one cannot be built or launched, what plain torch gives."""
    try:
        return kernels()
    except KernelError as error:
        replace_from_now(error)
        return reference()
