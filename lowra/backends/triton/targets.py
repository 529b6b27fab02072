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

    @property
    def shared_bytes(self) -> int:
        """What a program has of shared memory."""
        if self.backend == "cuda":
            return SHARED_KIB.get(int(self.arch), 99) << 10
        return 64 << 10 if self.backend else 1 << 62

    @property
    def multiplies_from_shared(self) -> bool:
        """Whether products in half precision read tokens from shared memory as they go."""
        return self.backend == "cuda" and int(self.arch) // 10 in (9, 10)

    @property
    def multiplies_behind(self) -> bool:
        """Whether products in half precision run on behind the instructions that follow them,
        reading values of W from registers meanwhile (`wgmma`)."""
        return self.backend == "cuda" and int(self.arch) // 10 == 9


SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""By NVIDIA architecture, as the CUDA guide lists it; others have 99."""
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
