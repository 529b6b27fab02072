"""How two adapters differ, linear by linear: in their products, bits and spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowra.adapters.factors import LowRank, balanced
from lowra.adapters.split import split_rank
from lowra.compiler.errors import AdapterError
from lowra.compiler.progress import stage
from lowra.runtime.adapter_files import read_adapter
from lowra.runtime.packed_adapter_files import is_packed, read_packed


@dataclass(frozen=True)
class _Side:
    """One adapter: factors and stored bits per parameter of each linear, by module name."""

    sites: Mapping[str, LowRank]
    bits: Mapping[str, float]

    @property
    def stored_bits(self) -> float:
        counts = {name: site.parameters for name, site in self.sites.items()}
        return sum(self.bits[name] * counts[name] for name in counts) / sum(counts.values())


def diff_adapters(first: str | Path, second: str | Path) -> dict[str, Any]:
    """What `second` is against `first`, packed or PEFT's LoRA, as plain data.

    A row per linear that both change: `difference` |s B A - s' B' A'|_F / |s B A|_F (None where
    the first is zero), `cosine` of the two products, and of each side its rank, |s B A|_F, stored
    bits per parameter, singular values, and how many directions cover 90 % of their squares.
    Linears that only one of them changes are named. Raises AdapterError for folders that cannot be
    read, and for adapters of other shapes.
    """
    one, two = _read(first), _read(second)
    both = [name for name in one.sites if name in two.sites]
    rows, inner = list[dict[str, Any]](), 0.0
    with stage("compare adapters", len(both)) as shown:
        for name in both:
            rows.append(_row(one, two, name))
            inner += rows[-1]["cosine"] * rows[-1]["first"]["norm"] * rows[-1]["second"]["norm"]
            shown.advance()
    whole = {s: sum(row[s]["norm"] ** 2 for row in rows) for s in ("first", "second")}
    return {
        "first": str(first),
        "second": str(second),
        "stored_bits": [one.stored_bits, two.stored_bits],
        "difference": _difference(whole["first"], whole["second"], inner),
        "only_first": [name for name in one.sites if name not in two.sites],
        "only_second": [name for name in two.sites if name not in one.sites],
        "sites": rows,
    }


def _read(source: str | Path) -> _Side:
    folder = Path(source).expanduser()
    if is_packed(folder):
        packed = read_packed(folder).adapter.sites
        sites = {s.name: LowRank(s.name, *s.dense(), s.scaling) for s in packed}
        return _Side(sites, {s.name: s.stored_bits() / s.parameters for s in packed})
    factors = read_adapter(source, check_base=False).factors
    bits = {
        name: 8 * (a.numel() * a.element_size() + b.numel() * b.element_size())
        / (a.numel() + b.numel())
        for name, (a, b, _) in factors.items()
    }  # fmt: skip
    return _Side({name: LowRank(name, *found) for name, found in factors.items()}, bits)


def _row(one: _Side, two: _Side, name: str) -> dict[str, Any]:
    left, right = one.sites[name], two.sites[name]
    if (left.n, left.k) != (right.n, right.k):
        raise AdapterError(
            f"{name} is [{left.n}, {left.k}] in the first adapter and [{right.n}, {right.k}] in "
            "the second: they are for different models"
        )
    sides = {"first": _side(one, left), "second": _side(two, right)}
    inner = left.scaling * right.scaling * _inner(left, right)
    norms = [side["norm"] for side in sides.values()]
    return {
        "name": name,
        "shape": [left.n, left.k],
        "difference": _difference(norms[0] ** 2, norms[1] ** 2, inner),
        "cosine": inner / math.prod(norms) if all(norms) else 0.0,
        **sides,
    }


def _side(side: _Side, site: LowRank) -> dict[str, Any]:
    sigma: Tensor = abs(site.scaling) * balanced(site).sigma.double()
    return {
        "rank": site.rank,
        "norm": abs(site.scaling) * math.sqrt(max(_inner(site, site), 0.0)),
        "stored_bits": side.bits[site.name],
        "directions_90": split_rank(sigma.float(), 0.9),
        "sigma": [float(f"{value:.5g}") for value in sigma.tolist()],
    }


def _inner(left: LowRank, right: LowRank) -> float:
    """<B A, B' A'> from two r x r' products, in float64."""
    a, b = left.a.double() @ right.a.double().T, left.b.double().T @ right.b.double()
    return float((a * b).sum())


def _difference(first: float, second: float, inner: float) -> float | None:
    """|P - P'| / |P| from |P|^2, |P'|^2 and <P, P'>; good to about 1e-7."""
    return math.sqrt(max(first + second - 2 * inner, 0.0) / first) if first else None
