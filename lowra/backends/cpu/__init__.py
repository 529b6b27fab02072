"""The CPU backend: C++ built on first use with the system's compiler."""

from lowra.backends.cpu import adapters, fitting, linear, table_gradients

__all__ = ["adapters", "fitting", "linear", "table_gradients"]
