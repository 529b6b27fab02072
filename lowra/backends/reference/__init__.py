"""The plain-torch backend: what every `lowra::` op means, on any device; the oracle."""

from lowra.backends.reference import adapters, embedding, feedback, linear, lloyd, moments, optimum
from lowra.compiler import adapter_ops, fitting_ops

__all__ = [
    "adapter_ops", "adapters", "embedding", "feedback", "fitting_ops", "linear", "lloyd", "moments",
    "optimum",
]  # fmt: skip
