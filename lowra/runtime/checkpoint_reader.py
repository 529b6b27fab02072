"""Reading checkpoint folders, which `checkpoint_writer` writes. Nothing is unpickled.

docs/storage-format.md describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowra.compiler.capture import tied_names
from lowra.compiler.correction import FACTORS, Correction
from lowra.compiler.errors import CheckpointError, LowraError
from lowra.compiler.program import Site
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import ROLES, PackedWeight, from_tensors
from lowra.runtime.compiled import Compiled
from lowra.runtime.manifest import MANIFEST, check_sums, read_manifest, stored_tensors
from lowra.runtime.module_view import place, put_adapter
from lowra.runtime.quantized_module import QuantizedModule, is_lora
from lowra.runtime.trained_norms import mark_trained
from lowra.runtime.training import attach

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_checkpoint(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The compiled model in a checkpoint folder.

    A Hugging Face model is built from its config; any other needs `model`, a dense module of the
    same structure, whose weights do not matter. Raises CheckpointError on anything that does not
    fit: a missing file, a tensor whose checksum differs, another format version, a wrong shape.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    tensors = stored_tensors(folder)
    check_sums(folder, tensors, manifest)
    try:
        model = _skeleton(folder, manifest) if model is None else model
        sites = _place_sites(model, manifest["sites"], tensors)
        _load_rest(model, folder, tensors)
        for name, dtype in manifest["buffers"].items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, leaf, getattr(module, leaf).to(DTYPES[dtype]))
        mark_trained(model, manifest.get("trained_norms", ()))
    except LowraError:
        raise
    except Exception as error:  # whatever a wrong config or entry makes torch or transformers raise
        raise CheckpointError(f"{folder} does not fit its {MANIFEST}: {error}") from error
    info = Compiled(
        sites, manifest["fingerprint"], manifest["recipe"], manifest["plan"], manifest["report"]
    )
    attach(model, info)
    return model.eval()


def _skeleton(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """The dense model class of a checkpoint, its weights not initialised."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds a {manifest['model_class']}, which lowra cannot build by itself; "
            "pass lowra.load(path, model=...) with a dense module of that class"
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None or not issubclass(kind, transformers.PreTrainedModel):
        raise CheckpointError(f"{folder}/config.json names {name!r}, no class of transformers")
    model = unfilled(kind, config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def unfilled(kind: Any, config: Any) -> Any:
    """A transformers model of class `kind` whose weights are not initialised, but tied."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = kind(config)
    model.tie_weights()
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
        place(model, site, packed, None, dtype, correction)
        put_adapter(model, site, _factors(site, entry, tensors))
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
        parameter.requires_grad_(is_lora(name))
