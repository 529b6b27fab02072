"""MODEL arguments: loading what they name, and saying what it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowra.cli.options import Dtype

if TYPE_CHECKING:
    import torch
    from torch import nn


def load_source(source: str, dtype: Dtype = Dtype.bfloat16) -> tuple[nn.Module, Any | None]:
    """The model that `source` names and its tokenizer. Raises ModelError, CheckpointError."""
    import torch

    from lowra.compiler.progress import stage
    from lowra.workflows.models import load_model

    with stage(f"load {source}", None):
        return load_model(source, dtype=getattr(torch, dtype.value))


def device_of(wanted: str | None) -> torch.device:
    """The device that people name; a GPU where they name none and there is one.

    Raises LowraError for one that torch does not know, or that is not there.
    """
    import torch

    from lowra.compiler.errors import LowraError

    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0][:200]
        raise LowraError(f"device {wanted!r} cannot be used ({first}): try cpu") from error
    if device.type == "meta":
        raise LowraError("device 'meta' holds no values: try cpu")
    return device


def load_shapes(source: str, dtype: Dtype) -> nn.Module:
    """The model that `source` names without its weights. Raises ModelError, RecipeError."""
    import torch

    from lowra.compiler.progress import stage
    from lowra.workflows.skeletons import load_skeleton

    with stage(f"read {source}", None):
        return load_skeleton(source, dtype=getattr(torch, dtype.value))


def require_tokenizer(tokenizer: Any | None, source: str) -> Any:
    """The tokenizer. Raises ModelError when `source` came without one."""
    from lowra.compiler.errors import ModelError

    if tokenizer is None:
        raise ModelError(
            f"{source!r} has no tokenizer, which text needs: put the tokenizer files of the "
            "original model beside it"
        )
    return tokenizer
