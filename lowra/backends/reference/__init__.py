"""The plain-torch backend: what every `lowra::` op means, on any device; the oracle."""

from lowra.backends.reference import feedback, linear, lloyd, moments, optimum
from lowra.compiler import fitting_ops

__all__ = ["feedback", "fitting_ops", "linear", "lloyd", "moments", "optimum"]
