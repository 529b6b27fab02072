"""The rotated Gram matrix of a site's input and its factor, computed once per distinct input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowra.compiler.facts import Prefix, Statistics
from lowra.compiler.program import Program, Site
from lowra.compiler.rotation import Rotation, rotate_gram
from lowra.passes.rounding.feedback import Factor, factorize


@dataclass(frozen=True)
class InputMoments:
    """gram float32 [k, k] in rotated coordinates, damped as its Factor is: the metric of errors."""

    gram: Tensor
    factor: Factor
    drift: Tensor | None = None
    """Mean of (x - x^) x^' [k, k] behind a quantized prefix (facts.Prefix), or a share of it."""

    def loss(self, error: Tensor) -> float:
        """tr(E G E') of E [n, k] without the damping."""
        damped = output_error(error, self.gram)
        return max(0.0, damped - self.factor.damping * float((error.double() ** 2).sum()))

    def target(self, weight: Tensor) -> Tensor:
        """The weight [n, k] that makes up for what the prefix did to its input.

        W* = W + W drift gram^-1: with the whole drift, the minimum of E|W x - W* x^|^2 (GPTAQ,
        arXiv 2504.02692).
        """
        if self.drift is None:
            return weight
        order, upper = self.factor.order, self.factor.upper
        change = torch.empty_like(weight)
        change[:, order] = (weight @ self.drift)[:, order] @ upper.T @ upper
        return weight + change


def output_error(error: Tensor, gram: Tensor) -> float:
    """tr(E G E') for E [n, k] in the coordinates of `gram`."""
    return float(((error @ gram) * error).sum(dtype=torch.float64))


def moments_behind(gram: Tensor, drift: Tensor, rotation: Rotation) -> InputMoments:
    """InputMoments of an input behind a quantized prefix, given in original coordinates."""
    moments = moments_of(rotate_gram(gram, rotation))
    return replace(moments, drift=rotate_gram(drift, rotation).T)  # which transposes


def moments_of_prefix(prefix: Prefix, rotation: Rotation) -> InputMoments:
    """The moments that a site is quantized for behind its prefix."""
    return moments_behind(prefix.gram.load(), prefix.share * prefix.drift.load(), rotation)


def moments_of(gram: Tensor) -> InputMoments:
    """InputMoments of a Gram matrix in its own coordinates."""
    factor = factorize(gram)
    return InputMoments(gram + torch.eye(gram.shape[0]) * factor.damping, factor)


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
            self._key, self._last = key, moments_of(gram)
        return self._last
