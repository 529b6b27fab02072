"""What kernels are written for: a GPU architecture, or Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One architecture.

    backend, arch: as `triton.backends.compiler.GPUTarget` names them; empty for the interpreter.
    permutes: codes are looked up with PTX byte permutes; else tables are read from memory.
    overlaps: a kernel may start before the one ahead of it has ended (programmatic dependent
    launch).
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    permutes: bool
    overlaps: bool


INTERPRETER = Target("interpreter", "", 0, 32, permutes=False, overlaps=False)
TARGETS = (
    Target("sm80", "cuda", 80, 32, permutes=True, overlaps=False),
    Target("sm90", "cuda", 90, 32, permutes=True, overlaps=True),
    Target("sm100", "cuda", 100, 32, permutes=True, overlaps=True),
    Target("gfx942", "hip", "gfx942", 64, permutes=False, overlaps=False),
)
"""Those that tests compile every kernel for."""


def cuda_target(major: int, minor: int) -> Target | None:
    """The target of a CUDA device by its compute capability; None below 8.0."""
    if major < 8:
        return None
    arch = 10 * major + minor
    return Target(f"sm{arch}", "cuda", arch, 32, permutes=True, overlaps=major >= 9)


def hip_target(arch: str) -> Target | None:
    """The target of an AMD device by its name, such as gfx942:sramecc+; None but for CDNA."""
    name = arch.split(":")[0]
    if name not in ("gfx90a", "gfx942", "gfx950"):
        return None
    return Target(name, "hip", name, 64, permutes=False, overlaps=False)
