"""The rotated Gram matrix of a site's input and its factor, computed once per distinct input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.facts import Statistics
from lowra.compiler.program import Program, Site
from lowra.compiler.rotation import Rotation, rotate_gram
from lowra.passes.feedback import Factor, factorize


@dataclass(frozen=True)
class InputMoments:
    """gram float32 [k, k] in rotated coordinates, damped as its Factor is: the metric of errors."""

    gram: Tensor
    factor: Factor


class MomentsReader:
    """Reads the moments of sites in turn; siblings (q/k/v, gate/up) share the last ones read."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._key: object = None
        self._last: InputMoments | None = None

    def read(self, site: Site) -> InputMoments:
        """The moments of a site. Raises CalibrationError for a Gram matrix beyond repair."""
        statistics = self.program.fact(site.name, Statistics)
        rotation = self.program.fact(site.name, Rotation)
        key = (statistics.gram, rotation, site.k)
        if self._last is None or key != self._key:
            gram = statistics.load(site.k)
            if statistics.gram is not None:  # the identity is the same in every rotation
                gram = rotate_gram(gram, rotation)
            factor = factorize(gram)
            gram = gram + torch.eye(site.k) * factor.damping
            self._key, self._last = key, InputMoments(gram, factor)
        return self._last
