"""report: what a compile made, as plain data that prints as a table or as JSON."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from lowra.compiler.facts import Adapter, Packed, Statistics
from lowra.compiler.program import Program, Site
from lowra.compiler.storage import PackedWeight


def make_report(program: Program, stages: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """Totals, a row per site, what was skipped and why, seconds per pass.

    Bits are per weight. `error` is the relative output error tr(E G E') / tr(W G W') of the base
    alone, `error_with_adapter` with LoRA; both in plain weight norm for a data-free compile.
    """
    sites = [_site_row(program, site) for site in program.sites]
    tokens = max((program.fact(s.name, Statistics).tokens for s in program.sites), default=0)
    return {
        "totals": _totals(program, sites),
        "calibration_tokens": tokens,
        "sites": sites,
        "skipped": [
            {"name": s.name, "shape": list(s.shape), "reason": s.reason} for s in program.skipped
        ],
        "pipeline": " ".join(program.history),
        "capture": program.warning or "torch.export",
        "seconds": {"total": seconds, **stages},
        "machine": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _weight(program: Program, site: Site) -> PackedWeight:
    return program.fact(site.name, Packed).weight


def _site_row(program: Program, site: Site) -> dict[str, Any]:
    packed = program.fact(site.name, Packed)
    adapter = program.find(site.name, Adapter)
    return {
        "name": site.name,
        "shape": [site.n, site.k],
        "rows": {str(width): rows for width, rows in packed.weight.panels},
        "stored_bits": packed.weight.stored_bits() / site.weights,
        "code_bits": packed.weight.code_bits() / site.weights,
        "bytes": packed.weight.stored_bits() // 8,
        "error": packed.error,
        "error_with_adapter": None if adapter is None else adapter.error,
        "rank": 0 if adapter is None else adapter.rank,
    }


def _totals(program: Program, sites: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(site.weights for site in program.sites)
    rows: Counter[str] = Counter()
    for site in sites:
        rows.update(site["rows"])
    adapters = [program.find(site.name, Adapter) for site in program.sites]
    adapter = sum(16 * (a.lora_a.numel() + a.lora_b.numel()) for a in adapters if a is not None)
    return {
        "sites": len(sites),
        "weights": weights,
        "stored_bits": sum(8 * site["bytes"] for site in sites) / weights,
        "code_bits": sum(_weight(program, s).code_bits() for s in program.sites) / weights,
        "adapter_bits": adapter / weights,
        "bytes": sum(site["bytes"] for site in sites),
        "rows": {width: rows[width] for width in sorted(rows)},
    }
