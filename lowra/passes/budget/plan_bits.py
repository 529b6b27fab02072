"""What a plan stores, in bits, counted as the file will hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowra.compiler.correction import correction_bits
from lowra.compiler.facts import AdapterRank, Codebooks, Precision
from lowra.compiler.program import Program, Site


@dataclass(frozen=True)
class Counted:
    """What counts towards the budget beside rows and codebooks: 16-bit LoRA factors of
    `adapter_rank` (a site's own AdapterRank comes first), and a correction at every site."""

    adapter_rank: int = 0
    correction_rank: int = 0
    correction_bits: int = 4


def plan_bits(program: Program, plan: Mapping[str, Precision], counted: Counted) -> int:
    """Stored bits of all sites at the widths of a plan."""
    return sum(_site(program, site, plan[site.name], counted) for site in program.sites)


def _site(program: Program, site: Site, precision: Precision, counted: Counted) -> int:
    layout = program.fact(site.name, Codebooks).layout
    rows = precision.histogram()
    bits = sum(count * layout.row_bits(site.k, width) for width, count in rows.items())
    bits += layout.site_bits(site.n, site.k, tuple(rows))
    chosen = program.find(site.name, AdapterRank)
    rank = counted.adapter_rank if chosen is None else chosen.rank
    bits += 16 * rank * (site.n + site.k)
    return bits + correction_bits(site.n, site.k, counted.correction_rank, counted.correction_bits)
