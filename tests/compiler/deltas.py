"""Adapters of every kind with random values, and what they mean in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowra.compiler.adapter_delta import AdapterDelta, Basis, Part, Shared, SiteDelta
from lowra.compiler.adapter_pages import CORE, DIAGONAL, OUT, POST, A, B, dense_run, packed_runs
from lowra.compiler.grids import WIDTHS, Coded, levels
from lowra.compiler.packed_adapter import PackedFactor, pack_factor

GRIDS = [*(f"{width:g}" for width in WIDTHS), "2a", "3a", "4a"]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FORMATS = [*GRIDS, *DTYPES]


@dataclass(frozen=True)
class Drawn:
    """What an adapter looks like at one linear: formats of runs of rows, and which parts it has."""

    a: tuple[tuple[int, str], ...] = ((4, "2"),)
    b: tuple[tuple[int, str], ...] = ((4, "2"),)
    group: int = -1
    parts: frozenset[str] = field(default_factory=frozenset)  # core, diagonal, out, post, shared
    scaling: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Meaning:
    """The formula's parts in float64, missing ones as what changes nothing."""

    a: Tensor
    b: Tensor
    core: Tensor
    out: Tensor
    post: Tensor
    scaling: float

    def __call__(self, y: Tensor, x: Tensor) -> Tensor:
        low = x.double() @ self.a.T @ self.core.T @ self.b
        return self.post * (y.double() + self.scaling * self.out * low)


def coded(rows: int, columns: int, format: str, group: int, generator: torch.Generator) -> Coded:
    width = float(format.rstrip("a"))
    number = int(width) if width.is_integer() else width
    count = len(levels(number))
    codes = torch.randint(0, count, (rows, columns), generator=generator).to(torch.uint8)
    groups = 1 if group == -1 else -(-columns // group)
    scales = (torch.rand(rows, groups, generator=generator) / columns**0.5 + 0.01).half()
    zeros = None
    if format.endswith("a"):
        zeros = torch.randint(0, count, (rows, groups), generator=generator).to(torch.uint8)
    return Coded(codes, scales, zeros, number, group)


def factor(
    rows: tuple[tuple[int, str], ...], columns: int, group: int, generator: torch.Generator
) -> PackedFactor:
    return pack_factor([coded(count, columns, f, group, generator) for count, f in rows])


def _rows(
    rows: tuple[tuple[int, str], ...], columns: int, group: int, generator: torch.Generator
) -> tuple[Part, Tensor]:
    runs, values = [], []
    for count, format in rows:
        if format in DTYPES:
            dense = torch.randn(count, columns, generator=generator) / columns**0.5
            dense = dense.to(DTYPES[format])
            runs.append(dense_run(dense))
            values.append(dense.double())
            continue
        packed = factor(((count, format),), columns, group, generator)
        runs += packed_runs(packed)
        values.append(packed.dequantize().double())
    return tuple(runs), torch.cat(values)


def site_of(name: str, n: int, k: int, drawn: Drawn) -> tuple[SiteDelta, Meaning]:
    """A SiteDelta and its meaning. With "shared", A and B are the first columns of longer rows."""
    generator = torch.Generator().manual_seed(drawn.seed)
    more = 7 if "shared" in drawn.parts else 0
    a, dense_a = _rows(drawn.a, k + more, drawn.group, generator)
    b, dense_b = _rows(drawn.b, n + more, drawn.group, generator)
    rank, inner = len(dense_a), len(dense_b)
    parts: dict[int, Part] = {A: a, B: b}
    if more:
        assert not isinstance(a, Shared) and not isinstance(b, Shared)
        basis = Basis({"a": a, "b": b})
        parts |= {A: Shared(basis, "a"), B: Shared(basis, "b")}
    core = torch.eye(rank, dtype=torch.float64)
    if "diagonal" in drawn.parts:
        vector = torch.randn(1, rank, generator=generator)
        parts[DIAGONAL] = (dense_run(vector),)
        core = vector.double() * core
    if "core" in drawn.parts or rank != inner:
        matrix = torch.randn(inner, rank, generator=generator)
        parts[CORE] = (dense_run(matrix),)
        core = matrix.double() @ core
    ones = torch.ones(n, dtype=torch.float64)
    vectors = {OUT: ones, POST: ones}
    for role, part in ((OUT, "out"), (POST, "post")):
        if part in drawn.parts:
            vector = torch.rand(1, n, generator=generator) + 0.5
            parts[role] = (dense_run(vector),)
            vectors[role] = vector[0].double()
    meaning = Meaning(
        dense_a[:, :k], dense_b[:, :n], core, vectors[OUT], vectors[POST], drawn.scaling
    )
    return SiteDelta(name, n, k, drawn.scaling, parts), meaning


def delta_of(sites: dict[str, tuple[int, int]], drawn: Drawn) -> tuple[AdapterDelta, dict]:
    """An adapter of linears [n, k] by name, and its meaning by name."""
    made = {
        name: site_of(name, n, k, Drawn(**{**vars(drawn), "seed": drawn.seed + 100 * i}))
        for i, (name, (n, k)) in enumerate(sites.items())
    }
    delta = AdapterDelta({name: site for name, (site, _) in made.items()})
    return delta, {name: meaning for name, (_, meaning) in made.items()}
