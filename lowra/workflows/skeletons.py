"""Models without weights: the module tree that a config or a GGUF header describes, on "meta"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowra.compiler.errors import ModelError, RecipeError
from lowra.workflows.models import (
    looks_like_path,
    model_class,
    quiet_bars,
    read_config,
    require_gguf,
    unreadable,
)


def load_skeleton(source: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model that `source` names (folder, `.gguf` file, Hub id) with shapes but no weights.

    Its parameters are on the meta device: a 7B model takes seconds and a few megabytes. Only
    config.json, or the header of the GGUF file, is read. Raises ModelError as load_model does,
    RecipeError for a checkpoint that is compressed already.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        require_gguf(path)
        return _on_meta(str(path), dtype, folder=str(path.parent), gguf_file=path.name)
    if path.is_dir():
        config = read_config(path)
        if (config.get("quantization_config") or {}).get("quant_method") == "lowra":
            raise RecipeError("this model is compiled already; plan the dense model instead")
    elif path.exists() or looks_like_path(str(source)):
        raise ModelError(
            f"no model at {str(source)!r}: give a folder with a config.json, a .gguf file, "
            "or a Hub id such as 'HuggingFaceTB/SmolLM2-135M'"
        )
    return _on_meta(str(source), dtype, folder=str(source))


def _on_meta(source: str, dtype: torch.dtype, folder: str, **options: Any) -> nn.Module:
    from transformers import AutoConfig

    try:
        with quiet_bars():
            config = AutoConfig.from_pretrained(folder, **options)
        kind = model_class(config)
        build = getattr(kind, "_from_config", None) or kind.from_config
        with torch.device("meta"):
            model = build(config, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, IndexError) as error:
        raise ModelError(unreadable(source, error)) from error
    return model.eval()
