"""Checkpoint folders: a Hugging Face folder with packed tensors, PEFT adapter files, lowra.json.

docs/storage-format.md describes them. A folder is written beside its target and renamed, so it is
there whole or not at all. Wall times stay out of it, so equal compiles give equal files. Every
tensor carries a sha256 in lowra.json. Nothing is unpickled.
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

from lowra.compiler.capture import tied_names
from lowra.compiler.correction import FACTORS, Correction
from lowra.compiler.errors import CheckpointError, LowraError, OutputError
from lowra.compiler.program import Site
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import ROLES, PackedWeight, from_tensors
from lowra.runtime.compiled import ATTRIBUTE, Compiled, compiled
from lowra.runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    check_sums,
    checksum,
    manifest_checksum,
    read_manifest,
    stored_tensors,
)
from lowra.runtime.module_view import place, quantized_linears
from lowra.runtime.modules import QuantizedLinear, QuantizedModule
from lowra.version import __version__

ADAPTER = "adapter_model.safetensors"
SHARD_SIZE = "5GB"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    target = Path(path)
    check_free(target, overwrite)
    with _written_whole(target) as folder:
        _write_files(model, info, folder, tokenizer)
    return target


def check_free(target: Path, overwrite: bool = False) -> None:
    """Raise OutputError when `target` holds something that must not be overwritten."""
    if target.is_file():
        raise OutputError(f"{target} is a file; name a folder")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target} exists and is not empty; choose another, or overwrite it")


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
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
    from safetensors.torch import save_file

    state = _distinct({n: t for n, t in model.state_dict().items() if not _is_lora(n)})
    save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE)
    factors = {n: t for n, t in _adapter_tensors(model).items()}
    if factors:
        save_file(factors, folder / ADAPTER, metadata={"format": "pt"})
        _write_json(folder / "adapter_config.json", _adapter_config(model, info))
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
        "checksums": {name: checksum(t) for name, t in sorted(stored_tensors(folder).items())},
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


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """LoRA factors under PEFT's names."""
    return {
        f"base_model.model.{name}.{role}.weight": getattr(layer, role).detach().clone()
        for name, layer in quantized_linears(model).items()
        for role in ("lora_A", "lora_B")
        if layer.rank
    }


def _adapter_config(model: nn.Module, info: Compiled) -> dict[str, Any]:
    layers = {n: m for n, m in quantized_linears(model).items() if m.rank}
    rank = max(layer.rank for layer in layers.values())
    scaling = next(iter(layers.values())).scaling
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scaling * rank,
        "rank_pattern": {n: m.rank for n, m in layers.items() if m.rank != rank},
        "alpha_pattern": {n: m.scaling * m.rank for n, m in layers.items() if m.rank != rank},
        "target_modules": sorted(layers),
        "base_model_name_or_path": info.recipe.get("model", None),
        "bias": "none",
    }


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


def load_checkpoint(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The compiled model in a checkpoint folder.

    A Hugging Face model is built from its config; any other needs `model`, a dense module of the
    same structure, whose weights do not matter. Raises CheckpointError on anything that does not
    fit: a missing file, a tensor whose checksum differs, another format version, a wrong shape.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    tensors = stored_tensors(folder)
    check_sums(folder, tensors, manifest["checksums"])
    try:
        model = _skeleton(folder, manifest) if model is None else model
        sites = _place_sites(model, manifest["sites"], tensors)
        _load_rest(model, folder, tensors)
        for name, dtype in manifest["buffers"].items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, leaf, getattr(module, leaf).to(DTYPES[dtype]))
    except LowraError:
        raise
    except Exception as error:  # whatever a wrong config or entry makes torch or transformers raise
        raise CheckpointError(f"{folder} does not fit its {MANIFEST}: {error}") from error
    info = Compiled(
        sites, manifest["fingerprint"], manifest["recipe"], manifest["plan"], manifest["report"]
    )
    setattr(model, ATTRIBUTE, info)
    return model.eval()


def _skeleton(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """The dense model class of a checkpoint, its weights not initialised."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a {manifest['model_class']}, which lowra cannot build by itself; "
            "pass lowra.load(path, model=...) with a dense module of that class"
        )
    import transformers
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None or not issubclass(kind, transformers.PreTrainedModel):
        raise CheckpointError(f"{folder}/config.json names {name!r}, no class of transformers")
    with no_init_weights():
        model = kind(config)
    model.tie_weights()
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _place_sites(
    model: nn.Module, entries: Mapping[str, Mapping[str, Any]], tensors: dict[str, Tensor]
) -> tuple[Site, ...]:
    """Put quantized layers into `model`; takes their tensors out of `tensors`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sites: list[Site] = []
    for name, entry in entries.items():
        dtype = DTYPES[entry["dtype"]]
        site = Site(
            name, entry["weight"], int(entry["n"]), int(entry["k"]), bool(entry["transposed"]),
            dtype, tuple(entry["modules"]), (), tuple(entry["embeddings"]),
        )  # fmt: skip
        holder = next(m for m in (*site.embeddings, *site.modules) if f"{m}.codes" in tensors)
        packed = _packed(holder, site.n, site.k, entry, tensors)
        correction = _correction(holder, site, entry.get("correction"), tensors)
        place(model, site, packed, _factors(site, entry, tensors), dtype, correction)
        sites.append(site)
    return tuple(sites)


def _packed(
    prefix: str, n: int, k: int, entry: Mapping[str, Any], tensors: dict[str, Tensor]
) -> PackedWeight:
    """The packed weight [n, k] under `prefix`; takes its tensors out of `tensors`."""
    stored = {r: tensors.pop(f"{prefix}.{r}") for r in ROLES if f"{prefix}.{r}" in tensors}
    rotation = Rotation(int(entry["rotation"]["seed"]), int(entry["rotation"]["block"]))
    return from_tensors(stored, n, k, int(entry["group"]), rotation)


def _correction(
    holder: str, site: Site, entry: Mapping[str, Any] | None, tensors: dict[str, Tensor]
) -> Correction | None:
    if entry is None:
        return None
    a, b = (f"{holder}.{name}" for name in FACTORS)
    rank, plain = int(entry["rank"]), {**entry, "rotation": {"seed": 0, "block": 1}}
    return Correction(
        _packed(a, rank, site.k, entry, tensors), _packed(b, rank, site.n, plain, tensors)
    )


def _factors(
    site: Site, entry: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor, float] | None:
    rank = int(entry["rank"])
    if rank == 0:
        return None
    factors: list[Tensor] = []
    for role, shape in (("lora_A", (rank, site.k)), ("lora_B", (site.n, rank))):
        found = [tensors.pop(f"base_model.model.{m}.{role}.weight", None) for m in site.modules]
        tensor = next((t for t in found if t is not None), None)
        if tensor is None or tuple(tensor.shape) != shape:
            got = "missing" if tensor is None else list(tensor.shape)
            raise CheckpointError(f"{role} of {site.name} is {got}, not {list(shape)}")
        factors.append(tensor)
    return factors[0], factors[1], float(entry["scaling"])


def _load_rest(model: nn.Module, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Load what is not a site. Tied names are stored once and stay tied; nothing may be left."""
    first = tied_names(model)
    for name, canonical in first.items():
        if canonical in tensors or name not in tensors:
            continue
        tensors[canonical] = tensors[name]
    tensors |= {name: tensors[c] for name, c in first.items() if c in tensors}
    packed = {n for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    result = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [n for n in result.missing_keys if n.rpartition(".")[0] not in packed]
    if missing or result.unexpected_keys:
        odd = missing[0] if missing else result.unexpected_keys[0]
        raise CheckpointError(f"{folder} does not fit the model at {odd}")
    for name, canonical in first.items():
        if name != canonical:
            owner, _, leaf = name.rpartition(".")
            source, _, source_leaf = canonical.rpartition(".")
            tensor = getattr(model.get_submodule(source), source_leaf)
            setattr(model.get_submodule(owner), leaf, tensor)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_lora(name))
