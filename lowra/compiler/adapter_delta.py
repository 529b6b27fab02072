"""SiteDelta, AdapterDelta: any adapter as what it changes at each linear, ready for pages.

LoRA and its kin are one formula (adapter_pages.py); a kind is which parts it has and where their
values come from: dense rows, packed rows, or rows of a `Basis` that many adapters share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lowra.compiler.adapter_pages import (
    CORE,
    DIAGONAL,
    OUT,
    POST,
    A,
    B,
    Run,
    chunk_words,
    dense_run,
    packed_runs,
)
from lowra.compiler.errors import AdapterError
from lowra.compiler.packed_adapter import PackedSite

NAMES = {A: "A", B: "B", CORE: "C", DIAGONAL: "the diagonal of C", OUT: "o", POST: "d"}


@dataclass(frozen=True)
class Basis:
    """Rows that adapters of one kind and base share: held in memory once for all of them.

    parts: runs by name. id: tells equal bases from others; made of their bytes where it is "".
    """

    parts: Mapping[str, tuple[Run, ...]]
    id: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            digest = hashlib.sha256()
            for name, runs in sorted(self.parts.items()):
                digest.update(f"{name} {[(r.format, r.rows, r.columns) for r in runs]}".encode())
                for run in runs:
                    digest.update(run.words().tobytes())
            object.__setattr__(self, "id", digest.hexdigest())


@dataclass(frozen=True)
class Shared:
    """A part that is rows of a basis: of longer rows, the first columns."""

    basis: Basis
    name: str

    @property
    def runs(self) -> tuple[Run, ...]:
        return self.basis.parts[self.name]


Part = tuple[Run, ...] | Shared


def runs_of(part: Part) -> tuple[Run, ...]:
    return part.runs if isinstance(part, Shared) else part


@dataclass(frozen=True)
class SiteDelta:
    """What an adapter changes at a linear [n, k]: parts by role. Checked when it is made."""

    name: str
    n: int
    k: int
    scaling: float
    parts: Mapping[int, Part]

    def __post_init__(self) -> None:
        rows, columns = dict[int, int](), dict[int, int]()
        for role, part in self.parts.items():
            runs = runs_of(part)
            rows[role] = sum(run.rows for run in runs)
            columns[role] = min((run.columns for run in runs), default=0)
        if not rows.get(A) or not rows.get(B):
            raise AdapterError(f"adapter of {self.name}: A and B need a rank of 1 or more")
        inner = rows[CORE] if CORE in rows else rows[A]
        wanted = {  # rows and columns of each part
            A: (rows[A], self.k), B: (inner, self.n), CORE: (inner, rows[A]),
            DIAGONAL: (1, rows[A]), OUT: (1, self.n), POST: (1, self.n),
        }  # fmt: skip
        for role, found in rows.items():
            shared = isinstance(self.parts[role], Shared)
            fits = columns[role] >= wanted[role][1] if shared else columns[role] == wanted[role][1]
            if found != wanted[role][0] or not fits:
                raise AdapterError(
                    f"adapter of {self.name}: {NAMES[role]} is [{found}, {columns[role]}], "
                    f"not {list(wanted[role])}"
                )

    @property
    def rank(self) -> int:
        return sum(run.rows for run in runs_of(self.parts[A]))


@dataclass(frozen=True)
class AdapterDelta:
    """A whole adapter, on the host: every linear it changes, by module name."""

    sites: Mapping[str, SiteDelta]
    kind: str = "lora"
    bases: Mapping[str, Basis] = field(init=False)

    def __post_init__(self) -> None:
        if not self.sites:
            raise AdapterError("an adapter without a single linear: there is nothing to apply")
        shared = [p for s in self.sites.values() for p in s.parts.values() if isinstance(p, Shared)]
        object.__setattr__(self, "bases", {part.basis.id: part.basis for part in shared})

    def own_bytes(self) -> int:
        """Bytes of the rows that it shares with no other."""
        own = [
            p for s in self.sites.values() for p in s.parts.values() if not isinstance(p, Shared)
        ]
        return 4 * sum(
            chunk_words(run.format, run.rows, run.columns, run.group)
            for runs in own
            for run in runs
        )


def dense_site(name: str, a: Tensor, b: Tensor, scaling: float) -> SiteDelta:
    """LoRA: A [r, k] and B [n, r] as they are, in 16 or 32 bits."""
    parts = {A: (dense_run(a),), B: (dense_run(b.T.contiguous()),)}
    return SiteDelta(name, b.shape[0], a.shape[1], scaling, parts)


def packed_site(site: PackedSite) -> SiteDelta:
    """A compressed LoRA, its codes as they are."""
    parts = {A: tuple(packed_runs(site.a)), B: tuple(packed_runs(site.b))}
    return SiteDelta(site.name, site.n, site.k, site.scaling, parts)
