"""rotate-inputs: give each site a randomised Hadamard transform of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowra.compiler.pipeline import Pass
from lowra.compiler.program import Program
from lowra.compiler.rotation import Rotation, largest_block


@dataclass(frozen=True)
class RotateInputs(Pass):
    """Decide seed and block of the input rotation per site (QuIP#, arXiv 2402.04396).

    Rotated rows are close to Gaussian, so a codebook shared by a panel and one scale per row serve
    as well as a codebook per row. The block is the largest power of two that divides k (64 for
    576, 512 for 1536); sites that share an input have the same k and so the same rotation.
    Off, every site gets block 1, which is no rotation.
    """

    name: ClassVar[str] = "rotate-inputs"
    writes: ClassVar = (Rotation,)
    seed: int = 0
    enabled: bool = True

    def run(self, program: Program) -> Program:
        return program.with_facts(
            {
                site.name: [Rotation(self.seed, largest_block(site.k) if self.enabled else 1)]
                for site in program.sites
            }
        )
