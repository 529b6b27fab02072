"""What an adapter folder holds, packed or plain, as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowra.adapters.factors import LowRank, balanced
from lowra.adapters.split import split_rank
from lowra.compiler.progress import stage
from lowra.runtime import packed_adapter_files as packed_files
from lowra.runtime.adapter_files import CONFIG, WEIGHTS, read_adapter
from lowra.runtime.packed_adapter_files import is_packed, read_packed
from lowra.workflows.compress_adapter import site_row


def describe_adapter(source: str | Path) -> dict[str, Any]:
    """What an adapter folder holds, packed or plain: totals and a row per site, as plain data."""
    folder = Path(source)
    if not is_packed(folder):
        return _describe_plain(folder)
    content = read_packed(folder)
    sites = content.adapter.sites
    return {
        "path": str(source),
        "kind": "packed",
        "method": content.method,
        "base": content.config.get("base_model_name_or_path"),
        "parameters": content.adapter.parameters,
        "stored_bits": content.adapter.stored_bits() / content.adapter.parameters,
        "file_bytes": _size(folder, packed_files.MANIFEST, packed_files.WEIGHTS),
        "sites": [site_row(site, content.errors[site.name]) for site in sites],
    }


def _describe_plain(folder: Path) -> dict[str, Any]:
    """With the spectrum in two numbers: how many directions cover 80 and 90 % of sum sigma^2."""
    found = read_adapter(folder, check_base=False)
    adapters = [LowRank(name, a, b, s) for name, (a, b, s) in found.factors.items()]
    rows: list[dict[str, Any]] = []
    with stage("inspect adapter", len(adapters)) as shown:
        for factors in adapters:
            sigma = balanced(factors).sigma
            rows.append(
                {
                    "name": factors.name,
                    "shape": [factors.n, factors.k],
                    "rank": factors.rank,
                    "scaling": factors.scaling,
                    "norm": abs(factors.scaling) * float(sigma.square().sum().sqrt()),
                    "directions_80": split_rank(sigma, 0.8),
                    "directions_90": split_rank(sigma, 0.9),
                }
            )
            shown.advance()
    elements = [x for f in adapters for x in (f.a, f.b)]
    parameters = sum(x.numel() for x in elements)
    return {
        "path": str(folder),
        "kind": "plain",
        "base": found.config.get("base_model_name_or_path"),
        "parameters": parameters,
        "stored_bits": sum(8 * x.numel() * x.element_size() for x in elements) / parameters,
        "file_bytes": _size(folder, CONFIG, WEIGHTS),
        "sites": rows,
    }


def _size(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)
