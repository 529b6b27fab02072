"""lowra: a compiler that makes language models small enough to fine-tune and serve anywhere."""

__version__ = "0.1.0"

from lowra.backends import reference as _reference  # registers the plain-torch kernels
from lowra.compiler.errors import LowraError

__all__ = [
    "LowraError",
    "Plan",
    "Recipe",
    "Session",
    "compile",
    "export",
    "load",
    "plan",
    "save",
]

_HOMES = {
    "compile": "lowra.api",
    "plan": "lowra.api",
    "save": "lowra.api",
    "load": "lowra.api",
    "export": "lowra.api",
    "Plan": "lowra.workflows.planning",
    "Recipe": "lowra.recipe",
    "Session": "lowra.runtime.session",
}


def __getattr__(name: str) -> object:
    """Public names are imported on first use, so that `import lowra` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lowra' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
