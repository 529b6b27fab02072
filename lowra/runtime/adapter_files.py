"""PEFT adapter folders: adapter_config.json and adapter_model.safetensors, written and read.

The header of the safetensors file says which base the factors were made for; PEFT ignores it.
(A key of our own in adapter_config.json would make PEFT ask its user to upgrade PEFT.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.runtime.adapter_config import (
    MERGE_FIRST,
    is_target,
    make_config,
    rank_of,
    require_lora,
    scaling_of,
)
from lowra.runtime.module_view import AdapterFactors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MODEL_KEY, BASE_KEY = "lowra.model", "lowra.base"
_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<role>lora_[AB])\.weight")
_MAGNITUDE = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Base:
    """What an adapter was made for: sha256 of the dense model, and of the tensors under it."""

    model: str
    packed: str

    def header(self) -> dict[str, str]:
        return {"format": "pt", MODEL_KEY: self.model, BASE_KEY: self.packed}


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA adapter read from a folder: factors A [r, k], B [n, r] and scaling by module name.

    `base` is None for an adapter that no lowra wrote. `magnitudes`: DoRA's m [n], else empty.
    """

    source: str
    config: Mapping[str, Any]
    factors: Mapping[str, AdapterFactors]
    base: Base | None
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def factor_tensors(factors: Mapping[str, AdapterFactors]) -> dict[str, Tensor]:
    """The factors under PEFT's names."""
    return {
        f"{PREFIX}{name}.{role}.weight": tensor.detach().contiguous().clone()
        for name, (a, b, _) in factors.items()
        for role, tensor in (("lora_A", a), ("lora_B", b))
    }


def write_files(
    folder: Path, factors: Mapping[str, AdapterFactors], base: Base, modules: Iterable[str],
    model_class: str, base_model: str | None = None, dropout: float = 0.0,
) -> None:  # fmt: skip
    """Write both files of an adapter into a folder that exists. `modules` as in `make_config`."""
    from safetensors.torch import save

    sizes = {name: (a.shape[0], scaling) for name, (a, _, scaling) in factors.items()}
    config = make_config(sizes, modules, model_class, base_model, dropout)
    data = save(factor_tensors(factors), metadata={"format": "pt"})
    (folder / WEIGHTS).write_bytes(_with_header(data, base.header()))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def sign_file(file: Path, base: Base) -> None:
    """Put the base into the header of a safetensors file that PEFT wrote."""
    file.write_bytes(_with_header(file.read_bytes(), base.header()))


def _with_header(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with this metadata, in this order: the library's own order is random."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size]) | {"__metadata__": dict(metadata)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read_adapter(source: str | Path, *, check_base: bool = True, dora: bool = False) -> AdapterFile:
    """The LoRA adapter in a folder or on the Hub, checked by itself: no model is looked at.

    Raises AdapterError for anything but plain LoRA (and DoRA where `dora` allows it) with finite
    factors whose ranks are those of the config.
    """
    folder = local_folder(source)
    name = str(source)
    config = read_config(folder / CONFIG)
    require_lora(config, name, check_base, ("use_dora",) if dora else ())
    tensors, base = _read_tensors(folder, name)
    magnitudes = _take_magnitudes(tensors) if config.get("use_dora") else {}
    pairs = _pairs(tensors, name)
    factors = {
        module: (*_checked(pair, module, config, name), scaling_of(config, module, len(pair[0])))
        for module, pair in pairs.items()
    }
    _require_targets(config, factors, name)
    if config.get("use_dora"):
        _require_magnitudes(magnitudes, factors, name)
    return AdapterFile(name, config, factors, base, magnitudes)


def _take_magnitudes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's magnitudes by module, taken out of the tensors."""
    found = {key: match["module"] for key in tensors if (match := _MAGNITUDE.fullmatch(key))}
    return {module: tensors.pop(key) for key, module in found.items()}


def _require_magnitudes(
    magnitudes: Mapping[str, Tensor], factors: Mapping[str, AdapterFactors], source: str
) -> None:
    for name in {*magnitudes, *factors}:
        found, factor = magnitudes.get(name), factors.get(name)
        if found is None or factor is None or found.shape != (factor[1].shape[0],):
            raise AdapterError(
                f"{source}: DoRA's lora_magnitude_vector of {name} does not stand beside factors "
                "of its size: save the adapter again"
            )
        if found.dtype not in _DTYPES or not found.isfinite().all():
            raise AdapterError(
                f"{source}: lora_magnitude_vector of {name} is {found.dtype} or holds NaN or "
                "infinity: take an earlier checkpoint"
            )


def local_folder(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise AdapterError(
            f"no adapter at {str(source)!r}: give a folder with {CONFIG} and {WEIGHTS}, or a Hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the client has a dozen kinds, of the network and of the Hub
        cause = str(error).strip().split("\n")[0]
        raise AdapterError(
            f"cannot fetch {source!r} from the Hugging Face Hub ({cause}): check the spelling and "
            "the network, or give a local folder"
        ) from error


def read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise AdapterError(f"{file.parent} holds no {CONFIG}: not an adapter as peft saves it")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"cannot read {file} ({error}): save the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds no JSON object: save the adapter again")
    return config


def _read_tensors(folder: Path, source: str) -> tuple[dict[str, Tensor], Base | None]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "only a pickled adapter_model.bin, which can run code" if pickled else "no weights"
        raise AdapterError(f"{source} holds {why}: save it as {WEIGHTS} (peft's default)")
    try:
        with safe_open(file, framework="pt") as opened:  # pyright: ignore
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged ({error}); fetch or save it again") from error
    known = MODEL_KEY in header and BASE_KEY in header
    return tensors, Base(header[MODEL_KEY], header[BASE_KEY]) if known else None


def factor_shapes(shapes: Mapping[str, tuple[int, ...]], source: str) -> dict[str, tuple[int, int]]:
    """(n, k) of every module, by the shapes of a file's tensors."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = _FACTOR.fullmatch(key)
        if match is not None:
            found.setdefault(match["module"], {})[match["role"]] = shape
        elif not _MAGNITUDE.fullmatch(key):
            raise AdapterError(
                f"{source} holds {key}, no LoRA factor of a linear layer: {MERGE_FIRST}"
            )
    for module, pair in found.items():
        a, b = pair.get("lora_A", ()), pair.get("lora_B", ())
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise AdapterError(
                f"{source}: {module} has A {list(a)} and B {list(b)}, not [r, k] and [n, r]: save "
                "the adapter again"
            )
    return {module: (pair["lora_B"][0], pair["lora_A"][1]) for module, pair in found.items()}


def _pairs(tensors: Mapping[str, Tensor], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module name. Raises AdapterError for a tensor that is neither, or one alone."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{source} holds {key}, no LoRA factor of a linear layer: {MERGE_FIRST}"
            )
        found.setdefault(match["module"], {})[match["role"]] = tensor
    if not found:
        raise AdapterError(f"{source} holds no factors at all: save the adapter again")
    for module, roles in found.items():
        for role in ("lora_A", "lora_B"):
            if role not in roles:
                raise AdapterError(f"{source} lacks {role} of {module}: save the adapter again")
    return {module: (roles["lora_A"], roles["lora_B"]) for module, roles in sorted(found.items())}


def _checked(
    pair: tuple[Tensor, Tensor], module: str, config: Mapping[str, Any], source: str
) -> tuple[Tensor, Tensor]:
    a, b = pair
    rank = rank_of(config, module)
    if a.dim() != 2 or b.dim() != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise AdapterError(
            f"{source}: {module} has A {list(a.shape)} and B {list(b.shape)}, but {CONFIG} gives "
            f"it rank {rank}, so A [{rank}, k] and B [n, {rank}]: save the adapter again"
        )
    for role, tensor in (("lora_A", a), ("lora_B", b)):
        if tensor.dtype not in _DTYPES:
            raise AdapterError(
                f"{source}: {role} of {module} is {tensor.dtype}, not a float of 16 or 32 bits"
            )
        if not tensor.isfinite().all():
            raise AdapterError(
                f"{source}: {role} of {module} holds NaN or infinity: its training diverged, take "
                "an earlier checkpoint"
            )
    return a, b


def _require_targets(
    config: Mapping[str, Any], factors: Mapping[str, AdapterFactors], source: str
) -> None:
    """Raise AdapterError where a target that the config names has no factors in the file."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return
    for target in targets:
        if not any(is_target({"target_modules": [target]}, name) for name in factors):
            raise AdapterError(
                f"{source} lacks the factors of {target}, which {CONFIG} targets: save it again"
            )
