"""report: what a compile made, as plain data that prints as a table or as JSON."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from lowra.compiler.correction import Correction
from lowra.compiler.dataflow import siblings
from lowra.compiler.facts import (
    Adapter,
    AdapterTuning,
    Assigned,
    BlockTuning,
    Codebooks,
    ModelTuning,
    Packed,
    RotationTrial,
    Statistics,
)
from lowra.compiler.program import Program, Site
from lowra.compiler.storage import PackedWeight


def make_report(program: Program, stages: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """Totals, a row per site, what was skipped and why, seconds per pass.

    Bits are per weight and include corrections; `correction_bits` says how much of them. `error` is
    the relative output error tr(E G E') / tr(W G W') of the base alone, correction included,
    `error_with_adapter` with LoRA; both in plain weight norm for a data-free compile. `rotation` is
    the block of a site's input rotation (1 is none), `rotation_losses` what its input lost in the
    trial with and without (None where none was held); the totals count distinct inputs. `layout` is
    how the site stores scales and codebooks (lowra.compiler.layout), `layouts` counts sites.
    """
    sites = [_site_row(program, site) for site in program.sites]
    tokens = max((program.fact(s.name, Statistics).tokens for s in program.sites), default=0)
    return {
        "totals": _totals(program, sites),
        "assignment": assignment_of(program),
        "calibration_tokens": tokens,
        "tuning": _tuning(program),
        "sites": sites,
        "skipped": [
            {"name": s.name, "shape": list(s.shape), "reason": s.reason} for s in program.skipped
        ],
        "pipeline": " ".join(program.history),
        "capture": program.warning or "torch.export",
        "seconds": {"total": seconds, **stages},
        "machine": {"python": platform.python_version(), "torch": torch.__version__},
    }


def assignment_of(program: Program) -> dict[str, Any] | None:
    """The expected loss of the plan, the proven bound on every other plan, and the price of a bit.

    `unit` says what a loss is. bound, gap and price are None where widths were replayed, one
    width for all rows was better, or ranks were chosen too. uniform: the comparison with one width
    for all rows on held-out tokens, None where nothing was compared. None for a program without an
    assignment.
    """
    found = [a for s in program.sites if (a := program.find(s.name, Assigned)) is not None]
    if not found:
        return None
    proof = found[0].proof
    return {
        "expected_loss": proof.loss,
        "bound": proof.bound,
        "gap": proof.gap,
        "price_of_a_bit": proof.price,
        "unit": _loss_unit(program),
        "bits": proof.bits,
        "budget_bits": proof.budget,
        "uniform": None if found[0].comparison is None else asdict(found[0].comparison),
    }


def _loss_unit(program: Program) -> str:
    if any(step.startswith("fit-codebooks") and "rule=paper" in step for step in program.history):
        return "squared weight error"
    found = [program.find(site.name, Statistics) for site in program.sites]
    if any(statistics and statistics.sensitivity is not None for statistics in found):
        return "nats per token"
    return "shares of a layer's output energy, summed"


def _tuning(program: Program) -> dict[str, Any]:
    """Held-out errors before and after tuning: of each block's output, KL of the base alone, and
    KL with the adapters."""
    blocks = {f.block: f for s in program.sites if (f := program.find(s.name, BlockTuning))}
    models = [f for s in program.sites if (f := program.find(s.name, ModelTuning))]
    adapters = [f for s in program.sites if (f := program.find(s.name, AdapterTuning))]
    return {
        "blocks": [
            {"name": f.block, "before": f.before, "after": f.after} for f in blocks.values()
        ],
        "kl": asdict(models[0]) if models else None,
        "kl_with_adapter": asdict(adapters[0]) if adapters else None,
    }


def _weight(program: Program, site: Site) -> PackedWeight:
    return program.fact(site.name, Packed).weight


def _site_row(program: Program, site: Site) -> dict[str, Any]:
    packed = program.fact(site.name, Packed)
    adapter = program.find(site.name, Adapter)
    assigned = program.find(site.name, Assigned)
    correction = program.find(site.name, Correction)
    trial = program.find(site.name, RotationTrial)
    beside = 0 if correction is None else correction.stored_bits()
    stored = packed.weight.stored_bits() + beside
    return {
        "name": site.name,
        "shape": [site.n, site.k],
        "rows": {str(width): rows for width, rows in packed.weight.rows.items()},
        "layout": str(program.fact(site.name, Codebooks).layout),
        "stored_bits": stored / site.weights,
        "correction_bits": beside / site.weights,
        "correction_rank": 0 if correction is None else correction.rank,
        "code_bits": packed.weight.code_bits() / site.weights,
        "bytes": stored // 8,
        "error": packed.error,
        "error_with_adapter": None if adapter is None else adapter.error,
        "rank": 0 if adapter is None else adapter.rank,
        "expected_loss": None if assigned is None else assigned.loss,
        "rotation": packed.weight.rotation.block,
        "rotation_losses": None if trial is None else {str(b): x for b, x in trial.losses.items()},
    }


def _totals(program: Program, sites: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(site.weights for site in program.sites)
    inputs = [_weight(program, group[0]).rotation for group in siblings(program)]
    rows: Counter[str] = Counter()
    for site in sites:
        rows.update(site["rows"])
    corrections = [program.find(site.name, Correction) for site in program.sites]
    adapters = [program.find(site.name, Adapter) for site in program.sites]
    adapter = sum(16 * (a.lora_a.numel() + a.lora_b.numel()) for a in adapters if a is not None)
    return {
        "sites": len(sites),
        "weights": weights,
        "stored_bits": sum(8 * site["bytes"] for site in sites) / weights,
        "code_bits": sum(_weight(program, s).code_bits() for s in program.sites) / weights,
        "correction_bits": sum(c.stored_bits() for c in corrections if c is not None) / weights,
        "adapter_bits": adapter / weights,
        "bytes": sum(site["bytes"] for site in sites),
        "rows": {width: rows[width] for width in sorted(rows, key=float)},
        "layouts": dict(Counter(site["layout"] for site in sites).most_common()),
        "inputs": len(inputs),
        "rotated_inputs": sum(rotation.active for rotation in inputs),
    }
