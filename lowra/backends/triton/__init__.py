"""The GPU backend: Triton source written per kernel key. Triton is imported on first use."""

from lowra.backends.triton import adapters, linear, rounding, table_gradients

__all__ = ["adapters", "linear", "rounding", "table_gradients"]
