"""lowra.json: the manifest of a checkpoint folder, its checksums and those of the tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowra.compiler.errors import CheckpointError
from lowra.compiler.layout import with_plain_codes

FORMAT_VERSION = 3
READABLE = (1, 2, 3)
"""Version 2 is version 3 without trellis rows; version 1 is that without ternary rows, compact
scales and codebooks, and corrections."""

MANIFEST = "lowra.json"
KEYS = {"buffers", "checksum", "sites", "checksums", "fingerprint", "recipe", "plan", "report"}


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 over the manifest without its own `checksum`, as compact JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes of a tensor, such as `int32 [5, 2]` and its bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    head = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return hashlib.sha256(head.encode() + data.tobytes()).hexdigest()


def header_checksums(folder: Path) -> dict[str, str]:
    """sha256 of the header of every safetensors file, its length in front included."""
    sums: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = opened.read(8)
            header = opened.read(int.from_bytes(length, "little"))
        sums[file.name] = hashlib.sha256(length + header).hexdigest()
    return sums


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file. Raises CheckpointError for a damaged file."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:  # pyright: ignore
                for name in opened.keys():  # noqa: SIM118
                    tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error}); fetch or write the checkpoint again"
            ) from error
    return tensors


def read_manifest(path: Path) -> dict[str, Any]:
    """lowra.json of a checkpoint. Raises CheckpointError when it is missing, broken or newer."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{path} holds no {MANIFEST}: not a lowra checkpoint")
    try:
        manifest = json.loads(file.read_text())
        version = manifest["format_version"]
        complete = set(manifest) >= KEYS or version not in READABLE
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); write the checkpoint again") from (
            error
        )
    if type(version) is not int or version not in READABLE:
        raise CheckpointError(
            f"{path} has format version {version}; this lowra reads "
            f"{', '.join(map(str, READABLE))}. Install the lowra that wrote it, or compile again"
        )
    if not complete:
        raise CheckpointError(
            f"{file} lacks {', '.join(sorted(KEYS - set(manifest)))}; write the checkpoint again"
        )
    if manifest["checksum"] != manifest_checksum(manifest):
        raise CheckpointError(f"{file} was damaged or edited; fetch or write the checkpoint again")
    if version < FORMAT_VERSION:
        for holder in (manifest, manifest["plan"]):
            if "recipe" in holder:
                holder["recipe"] = with_plain_codes(holder["recipe"])
    return manifest


def check_sums(folder: Path, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless `tensors` and the headers of their files are exactly those of
    the manifest, unchanged."""
    sums: Mapping[str, str] = manifest["checksums"]
    missing = sorted(set(sums) - set(tensors))
    extra = sorted(set(tensors) - set(sums))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which it never wrote"
        raise CheckpointError(f"{folder} {what}; fetch or write the checkpoint again")
    for name, tensor in tensors.items():
        if checksum(tensor) != sums[name]:
            raise CheckpointError(
                f"{folder}: tensor {name} differs from its checksum; "
                "the file was damaged or edited, fetch or write the checkpoint again"
            )
    headers = header_checksums(folder)
    for file, wanted in manifest.get("headers", {}).items():
        if headers.get(file) != wanted:
            raise CheckpointError(
                f"{folder / file}: its header differs from its checksum; "
                "the file was damaged or edited, fetch or write the checkpoint again"
            )
