"""lowra: a compiler that makes language models small enough to fine-tune and serve anywhere."""

from typing import TYPE_CHECKING

import lowra.backends.cpu
import lowra.backends.reference
import lowra.backends.triton  # noqa: F401 - each registers its kernels
from lowra.compiler.errors import LowraError
from lowra.version import __version__

if TYPE_CHECKING:
    from lowra.api import (
        compile,
        export,
        load,
        load_adapter,
        merge_adapter,
        plan,
        save,
        save_adapter,
    )
    from lowra.backends.activations import get_activations, set_activations
    from lowra.compiler.half_products import half_products
    from lowra.recipe import Recipe
    from lowra.runtime.serving.pool import AdapterPool
    from lowra.runtime.session import Session
    from lowra.runtime.training import prepare_training, trainable
    from lowra.workflows.compress_adapter import compress_adapter, export_adapter
    from lowra.workflows.finetune import finetune
    from lowra.workflows.planning import Plan

__all__ = [
    "AdapterPool",
    "LowraError",
    "Plan",
    "Recipe",
    "Session",
    "__version__",
    "compile",
    "compress_adapter",
    "export",
    "export_adapter",
    "finetune",
    "get_activations",
    "half_products",
    "load",
    "load_adapter",
    "merge_adapter",
    "plan",
    "prepare_training",
    "save",
    "save_adapter",
    "set_activations",
    "trainable",
]

_HOMES = {
    "AdapterPool": "lowra.runtime.serving.pool",
    "compile": "lowra.api",
    "plan": "lowra.api",
    "save": "lowra.api",
    "load": "lowra.api",
    "export": "lowra.api",
    "finetune": "lowra.workflows.finetune",
    "get_activations": "lowra.backends.activations",
    "half_products": "lowra.compiler.half_products",
    "set_activations": "lowra.backends.activations",
    "save_adapter": "lowra.api",
    "load_adapter": "lowra.api",
    "merge_adapter": "lowra.api",
    "compress_adapter": "lowra.workflows.compress_adapter",
    "export_adapter": "lowra.workflows.compress_adapter",
    "Plan": "lowra.workflows.planning",
    "Recipe": "lowra.recipe",
    "Session": "lowra.runtime.session",
    "prepare_training": "lowra.runtime.training",
    "trainable": "lowra.runtime.training",
}


def __getattr__(name: str) -> object:
    """Public names are imported on first use, so that `import lowra` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lowra' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
