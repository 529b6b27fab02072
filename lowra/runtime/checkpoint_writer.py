"""Writing checkpoints: a Hugging Face folder with packed tensors, PEFT adapter files, lowra.json.

docs/storage-format.md describes them. A folder is written beside its target and renamed, so it is
there whole or not at all. Wall times stay out of it, so equal compiles give equal files. Every
tensor carries a sha256 in lowra.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lowra.compiler.errors import CheckpointError, OutputError
from lowra.compiler.program import Site
from lowra.runtime.adapter_files import write_files
from lowra.runtime.adapter_view import base_of, dropout_of, factors_of, require_unwrapped
from lowra.runtime.compiled import Compiled, compiled
from lowra.runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    checksum,
    header_checksums,
    manifest_checksum,
    stored_tensors,
)
from lowra.runtime.modules import QuantizedLinear
from lowra.runtime.quantized_module import QuantizedModule, is_lora
from lowra.runtime.trained_norms import as_stored, held_norms
from lowra.runtime.trained_tables import is_offset
from lowra.version import __version__

SHARD_SIZE = "5GB"


def save_checkpoint(
    model: nn.Module, path: str | Path, *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write a compiled model as a checkpoint folder and return its path.

    Raises OutputError when the folder exists (and `overwrite` is not set), cannot be written, or
    the disk is full; CheckpointError when the model was not compiled by lowra.
    """
    info = compiled(model)
    if info is None:
        raise CheckpointError("this model was not compiled by lowra; call lowra.compile first")
    require_unwrapped(model, info)
    target = Path(path)
    check_free(target, overwrite)
    with written_whole(target) as folder:
        _write_files(model, info, folder, tokenizer)
    return target


def check_free(target: Path, overwrite: bool = False) -> None:
    """Raise OutputError when `target` holds something that must not be overwritten."""
    if target.is_file():
        raise OutputError(f"{target} is a file; name a folder")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target} exists and is not empty; choose another, or overwrite it")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` when the block ends well and vanishes when it does not."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.chmod(0o755)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        full = "No space left" in str(error)
        why = "the disk is full" if full else str(error)
        raise OutputError(f"cannot write {target}: {why}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(model: nn.Module, info: Compiled, folder: Path, tokenizer: Any) -> None:
    from huggingface_hub import save_torch_state_dict

    kept = {n: t for n, t in model.state_dict().items() if not (is_lora(n) or is_offset(n))}
    state = _distinct(as_stored(model, kept))
    save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE)
    if factors := factors_of(model):
        names = [name for name, _ in model.named_modules()]
        base, kind = base_of(model, info), type(model).__name__
        write_files(folder, factors, base, names, kind, dropout=dropout_of(model))
    sites = {site.name: _site_entry(model, site) for site in info.sites}
    manifest = {
        "format_version": FORMAT_VERSION,
        "lowra": __version__,
        "torch": torch.__version__,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "fingerprint": info.fingerprint,
        "recipe": dict(info.recipe),
        "plan": dict(info.plan),
        "report": {key: value for key, value in info.report.items() if key != "seconds"},
        "sites": sites,
        "buffers": _unstored_buffers(model),
        "trained_norms": sorted(held_norms(model)),
        "checksums": {name: checksum(t) for name, t in sorted(stored_tensors(folder).items())},
        "headers": header_checksums(folder),
    }
    manifest["checksum"] = manifest_checksum(manifest)
    _write_json(folder / MANIFEST, manifest)
    _write_config(model, info, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_model_card(manifest))


def _unstored_buffers(model: nn.Module) -> dict[str, str]:
    """dtypes of floating buffers that a state dict leaves out, such as rotary frequencies."""
    stored = model.state_dict()
    packed = {n for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    return {
        name: str(buffer.dtype).removeprefix("torch.")
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and name not in stored
        if name.rpartition(".")[0] not in packed
    }


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the first of the names that share them."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() == 0 or key not in seen:
            kept[name] = tensor
            seen.add(key)
    return kept


def _site_entry(model: nn.Module, site: Site) -> dict[str, Any]:
    layer = model.get_submodule(site.modules[0])
    assert isinstance(layer, QuantizedLinear)
    return {
        "n": site.n, "k": site.k, "group": layer.group,
        "rotation": {"seed": layer.rotation.seed, "block": layer.rotation.block},
        "dtype": str(layer.dtype).removeprefix("torch."),
        "modules": list(site.modules), "embeddings": list(site.embeddings),
        "rank": layer.rank, "scaling": layer.scaling, "weight": site.weight,
        "transposed": site.transposed, "correction": _correction_entry(layer),
    }  # fmt: skip


def _correction_entry(layer: QuantizedLinear) -> dict[str, Any] | None:
    """Shape and rotation of a site's correction; the rest is in its tensors."""
    if (correction := layer.correction) is None:
        return None
    rotation = correction.a.rotation
    return {
        "rank": correction.rank, "group": correction.a.group,
        "rotation": {"seed": rotation.seed, "block": rotation.block},
    }  # fmt: skip


def _write_config(model: nn.Module, info: Compiled, folder: Path) -> None:
    config = getattr(model, "config", None)
    if config is None:
        return
    data = config.to_dict()
    data["architectures"] = [type(model).__name__]
    data["quantization_config"] = {
        "quant_method": "lowra",
        "format_version": FORMAT_VERSION,
        "bit_budget": info.recipe.get("bit_budget"),
    }
    _write_json(folder / "config.json", data)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n")


def _model_card(manifest: Mapping[str, Any]) -> str:
    totals = manifest["report"].get("totals", {})
    bits = totals.get("stored_bits")
    size = "" if bits is None else f" at {bits:.3f} stored bits per compressed weight"
    return (
        "---\nlibrary_name: lowra\nbase_model_relation: quantized\n---\n\n"
        f"Compressed by lowra {manifest['lowra']}{size}.\n\n"
        "```python\nimport lowra\n\nmodel = lowra.load(path)\n```\n"
    )
