"""The plain-torch backend: what every `lowra::` op means, on any device; the oracle."""

from lowra.backends.reference import linear

__all__ = ["linear"]
