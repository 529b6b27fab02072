"""What the manifests of both formats of adapters have in common, checked field by field."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowra.compiler.errors import AdapterError


def require_fields(manifest: Mapping[str, Any], file: Path) -> None:
    """Raise AdapterError unless sites, base and checksums are of the types that lowra writes.

    A seal tells only that a manifest is as somebody wrote it. The base may be `{}`.
    """
    for name in ("sites", "base", "checksums"):
        require(isinstance(manifest[name], dict), file, name, manifest[name])
    require(manifest["sites"], file, "sites", manifest["sites"])
    for name, entry in manifest["sites"].items():
        require(isinstance(entry, dict), file, f"sites.{name}", entry)
        for key in ("n", "k"):
            size = entry.get(key)
            require(type(size) is int and size > 0, file, f"sites.{name}.{key}", size)
    base, sums = manifest["base"], manifest["checksums"]
    named = not base or set(base) == {"model", "packed"}
    require(named and all(isinstance(v, str) for v in base.values()), file, "base", base)
    require(all(isinstance(v, str) for v in sums.values()), file, "checksums", sums)


def require(fits: object, file: Path, field: str, value: object) -> None:
    """Raise AdapterError for a field that does not fit."""
    if not fits:
        raise AdapterError(
            f"{file}: {field} is {reprlib.repr(value)}, which lowra never writes; fetch or write "
            "the adapter again"
        )
