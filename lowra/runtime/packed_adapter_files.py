"""Folders of packed adapters: lowra_adapter.json and adapter_packed.safetensors.

docs/adapter-format.md is the specification. A folder is written beside its target and renamed, the
manifest is sealed by its checksum and holds those of the tensors, and equal adapters give equal
files. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.compiler.grids import ASYMMETRIC, SYMMETRIC
from lowra.compiler.packed_adapter import (
    PackedAdapter,
    PackedFactor,
    PackedSite,
    Segment,
    split_tensors,
)
from lowra.runtime.adapter_manifest import require, require_fields
from lowra.runtime.checkpoint_writer import check_free, written_whole
from lowra.runtime.manifest import checksum, manifest_checksum
from lowra.version import __version__

FORMAT_VERSION = 1
MANIFEST = "lowra_adapter.json"
WEIGHTS = "adapter_packed.safetensors"
KEYS = {
    "format_version", "lowra", "method", "group", "peft_config", "base", "sites", "checksums",
    "checksum",
}  # fmt: skip
SITE_KEYS = ("n", "k", "rank", "scaling", "a", "b", "error")
_SEGMENT = re.compile(r"([1-9]\d{0,6})x(1|1\.6|2|3|4)(a?)")


@dataclass(frozen=True)
class PackedFile:
    """A packed adapter as a folder holds it.

    method: how it was compressed, in words. config: the PEFT config of the adapter that it came
    from. base: fingerprints of the base, where the adapter named them. errors: by site, the part of
    |B A|_F^2 that is lost.
    """

    adapter: PackedAdapter
    method: str
    config: Mapping[str, Any]
    base: Mapping[str, str]
    errors: Mapping[str, float]


def write_packed(path: str | Path, content: PackedFile, *, overwrite: bool = False) -> int:
    """Write a packed adapter's folder; returns the bytes of its files.

    Raises OutputError when it exists (and `overwrite` is not set) or cannot be written.
    """
    from safetensors.torch import save_file

    target = Path(path)
    check_free(target, overwrite)
    tensors = content.adapter.tensors()
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "lowra": __version__,
        "method": content.method,
        "group": content.adapter.sites[0].a.group,
        "peft_config": dict(content.config),
        "base": dict(content.base),
        "sites": {s.name: _entry(s, content.errors[s.name]) for s in content.adapter.sites},
        "checksums": {role: checksum(tensor) for role, tensor in tensors.items()},
    }
    manifest["checksum"] = manifest_checksum(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")) + "\n"
    with written_whole(target) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.iterdir())
    return size


def is_packed(path: Path) -> bool:
    """Whether a folder says that it holds a packed adapter."""
    return (path / MANIFEST).is_file()


def read_packed(path: str | Path) -> PackedFile:
    """The packed adapter in a folder.

    Raises AdapterError for a file that is missing, cut short, edited, or of another version.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    tensors = _read_tensors(folder, manifest["checksums"])
    try:
        adapter = PackedAdapter(_sites(manifest, tensors))
        errors = {name: float(entry["error"]) for name, entry in manifest["sites"].items()}
    except AdapterError as error:
        raise AdapterError(f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise AdapterError(
            f"{folder / MANIFEST} has a broken entry ({error}): fetch or write the adapter again"
        ) from error
    return PackedFile(
        adapter, str(manifest["method"]), manifest["peft_config"], manifest["base"], errors
    )


def _entry(site: PackedSite, error: float) -> dict[str, Any]:
    return {
        "n": site.n, "k": site.k, "rank": site.rank, "scaling": site.scaling,
        "a": site.a.text(), "b": site.b.text(), "error": float(f"{error:.4g}"),
    }  # fmt: skip


def _sites(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[PackedSite, ...]:
    group, entries = manifest["group"], manifest["sites"]
    shapes: list[tuple[int, int, tuple[Segment, ...]]] = []
    for name, entry in entries.items():
        if type(entry["rank"]) is not int or entry["rank"] < 1:
            raise AdapterError(f"{name}: its rank is {entry['rank']!r}, no positive integer")
        shapes += [(entry["k"], group, _segments(entry["a"]))]
        shapes += [(entry["n"], group, _segments(entry["b"]))]
    factors: list[PackedFactor] = split_tensors(tensors, shapes)
    pairs = zip(entries.items(), factors[0::2], factors[1::2], strict=True)
    return tuple(
        PackedSite(name, a, b, float(entry["scaling"]), entry["rank"])
        for (name, entry), a, b in pairs
    )


@functools.lru_cache(maxsize=4096)  # an adapter has hundreds of factors of a few kinds
def _segments(text: str) -> tuple[Segment, ...]:
    """`4x3a,12x1` as segments."""
    found = [_SEGMENT.fullmatch(part) for part in text.split(",")]
    segments: list[Segment] = []
    for match, part in zip(found, text.split(","), strict=True):
        if match is None:
            raise AdapterError(f"{part!r} is no segment such as 4x3a or 12x1.6")
        rows, width, mark = match.groups()
        number = float(width) if "." in width else int(width)
        segments.append(Segment(int(rows), number, ASYMMETRIC if mark else SYMMETRIC))
    return tuple(segments)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its seal checked; no tensor is read. Raises as `read_packed` does."""
    file = folder / MANIFEST
    if not file.is_file():
        raise AdapterError(f"{folder} holds no {MANIFEST}: not a packed adapter")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{file} cannot be read ({type(error).__name__}: {error}); fetch or write the adapter "
            "again"
        ) from error
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{folder} has adapter format version {version!r}; this lowra reads {FORMAT_VERSION}. "
            "Install the lowra that wrote it, or compress the adapter again"
        )
    missing = sorted(KEYS - set(manifest))
    if missing:
        raise AdapterError(f"{file} lacks {', '.join(missing)}; fetch or write the adapter again")
    if manifest["checksum"] != manifest_checksum(manifest):
        raise AdapterError(f"{file} was damaged or edited; fetch or write the adapter again")
    require_fields(manifest, file)
    config, group = manifest["peft_config"], manifest["group"]
    require(isinstance(config, dict), file, "peft_config", config)
    require(type(group) is int, file, "group", group)
    return manifest


def _read_tensors(folder: Path, sums: Mapping[str, str]) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise AdapterError(f"{folder} lacks {WEIGHTS}; fetch or write the adapter again")
    try:
        with safe_open(file, framework="pt") as opened:  # pyright: ignore
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(
            f"{file} is damaged ({error}); fetch or write the adapter again"
        ) from error
    if set(tensors) != set(sums):
        raise AdapterError(f"{file} holds {sorted(tensors)}, not {sorted(sums)}; fetch it again")
    for name, tensor in tensors.items():
        if checksum(tensor) != sums[name]:
            raise AdapterError(
                f"{file}: {name} differ from their checksum; the file was damaged or edited, fetch "
                "or write the adapter again"
            )
    return tensors
