"""PackedFactor, PackedSite, PackedAdapter: how a compressed adapter is stored.

docs/adapter-format.md is the specification; this file and packing.py are its only implementation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.compiler.grids import (
    ASYMMETRIC,
    ASYMMETRIC_WIDTHS,
    SYMMETRIC,
    WIDTHS,
    Coded,
    dequantize,
)
from lowra.compiler.packing import (
    pack_bits,
    pack_rows,
    row_words,
    unpack_bits,
    unpack_rows,
    width_id,
)
from lowra.compiler.storage import ROW_SCALES, scale_groups

ROLES: tuple[str, ...] = ("codes", "scales", "zeros")
"""Stored tensors of an adapter; `zeros` only where a grid is asymmetric."""

DTYPES = {"codes": torch.int32, "scales": torch.float16, "zeros": torch.uint8}


@dataclass(frozen=True)
class Segment:
    """A run of directions of a factor that share a width and a grid."""

    rows: int
    width: float
    grid: str

    def __post_init__(self) -> None:
        widths = ASYMMETRIC_WIDTHS if self.grid == ASYMMETRIC else WIDTHS
        if self.rows < 1 or self.width not in widths or self.grid not in (SYMMETRIC, ASYMMETRIC):
            raise AdapterError(
                f"a segment of {self.rows} rows at {self.width} bits on a grid {self.grid!r}; a "
                f"symmetric grid has {', '.join(f'{w:g}' for w in WIDTHS)} bits, an asymmetric one "
                f"{', '.join(map(str, ASYMMETRIC_WIDTHS))}"
            )

    def sizes(self, length: int, group: int) -> dict[str, int]:
        """Elements of each stored tensor: words, half-precision scales, bytes of zero points."""
        return _sizes(self, length, group)


@functools.lru_cache(maxsize=4096)  # an adapter has a thousand segments of a few sizes
def _sizes(segment: Segment, length: int, group: int) -> dict[str, int]:
    scales = segment.rows * scale_groups(length, group)
    zeros = -(-scales * int(segment.width) // 8) if segment.grid == ASYMMETRIC else 0
    words = segment.rows * row_words(length, width_id(segment.width))
    return {"codes": words, "scales": scales, "zeros": zeros}


@functools.lru_cache(maxsize=4096)
def _sizes_of_all(segments: tuple[Segment, ...], length: int, group: int) -> dict[str, int]:
    return _total(segment.sizes(length, group) for segment in segments)


@dataclass(frozen=True)
class PackedFactor:
    """Directions [r, length] of one factor: A as it is, B transposed, so that rows are long.

    Per segment, one after another: `codes` int32 as `pack_rows` makes them; `scales` float16
    [rows * groups]; `zeros` uint8, the zero points of an asymmetric segment at its own width, bit
    after bit, filled up to a byte.
    """

    length: int
    group: int
    segments: tuple[Segment, ...]
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __post_init__(self) -> None:
        _require_layout(self.length, self.group, self.segments)
        for role, count in self.sizes().items():
            tensor: Tensor = getattr(self, role)
            if tensor.dtype != DTYPES[role] or tensor.shape != (count,):
                raise self._wrong(
                    f"{role} are {tensor.dtype} {list(tensor.shape)}, not {DTYPES[role]} [{count}]"
                )
        if not _are_scales(self.scales):
            raise self._wrong("a scale is negative or not finite")

    @classmethod
    def part(
        cls, length: int, group: int, segments: tuple[Segment, ...], tensors: Sequence[Tensor]
    ) -> PackedFactor:
        """A factor of tensors, in the order of `ROLES`, that are known to be its own."""
        made = object.__new__(cls)
        fields = {"length": length, "group": group, "segments": segments}
        made.__dict__.update(fields, **dict(zip(ROLES, tensors, strict=True)))
        return made

    def _wrong(self, what: str) -> AdapterError:
        return AdapterError(f"a packed factor [{self.rank}, {self.length}]: {what}")

    @property
    def rank(self) -> int:
        return sum(segment.rows for segment in self.segments)

    def text(self) -> str:
        """`4x3,12x1`: rows times width of each segment, `4x3a` for an asymmetric one."""
        marks = {SYMMETRIC: "", ASYMMETRIC: "a"}
        return ",".join(f"{s.rows}x{s.width:g}{marks[s.grid]}" for s in self.segments)

    def sizes(self) -> dict[str, int]:
        """Elements of each stored tensor."""
        return _sizes_of_all(self.segments, self.length, self.group)

    def stored_bits(self) -> int:
        """8 x the bytes of every stored tensor."""
        return sum(8 * t.numel() * t.element_size() for t in (self.codes, self.scales, self.zeros))

    def coded(self) -> list[Coded]:
        """Codes, scales and zero points of each segment, unpacked."""
        groups, found = scale_groups(self.length, self.group), list[Coded]()
        start = dict.fromkeys(ROLES, 0)
        for segment in self.segments:
            sizes, part = segment.sizes(self.length, self.group), dict[str, Tensor]()
            for role, size in sizes.items():
                part[role] = getattr(self, role)[start[role] : start[role] + size]
                start[role] += size
            codes = unpack_rows(part["codes"], segment.rows, self.length, width_id(segment.width))
            zeros = None
            if segment.grid == ASYMMETRIC:
                count = segment.rows * groups
                zeros = unpack_bits(part["zeros"], count, int(segment.width)).view(-1, groups)
            scales = part["scales"].view(segment.rows, groups)
            found.append(Coded(codes.to(torch.uint8), scales, zeros, segment.width, self.group))
        return found

    def dequantize(self) -> Tensor:
        """float32 [r, length]."""
        parts = (
            dequantize(coded.codes, coded.scales, coded.zeros, coded.width, coded.group)
            for coded in self.coded()
        )
        return torch.cat(list(parts))


@dataclass(frozen=True)
class PackedSite:
    """The packed adapter of one linear [n, k]: y += scaling * B A x.

    a: rows [r, k]; b: rows [r, n], B transposed. Row i of both is direction i; their segments may
    differ. rank: of the adapter that it came from, which plain export gives back; it is above r
    only where that adapter had more directions than min(n, k).
    """

    name: str
    a: PackedFactor
    b: PackedFactor
    scaling: float
    rank: int

    def __post_init__(self) -> None:
        if self.a.rank != self.b.rank or self.rank < self.a.rank:
            raise AdapterError(
                f"packed adapter of {self.name}: its factors hold {self.a.rank} and {self.b.rank} "
                f"directions, its rank is {self.rank}"
            )
        if not math.isfinite(self.scaling):
            raise AdapterError(f"packed adapter of {self.name}: its scaling is {self.scaling}")

    @property
    def n(self) -> int:
        return self.b.length

    @property
    def k(self) -> int:
        return self.a.length

    @property
    def parameters(self) -> int:
        """Of the factors [r, k] and [n, r] that it stands for."""
        return self.rank * (self.n + self.k)

    def stored_bits(self) -> int:
        return self.a.stored_bits() + self.b.stored_bits()

    def dense(self) -> tuple[Tensor, Tensor]:
        """float32 A [rank, k] and B [n, rank], scaling left out; directions it lacks are 0."""
        a, b = self.a.dequantize(), self.b.dequantize()
        missing = self.rank - len(a)
        if missing:
            a = torch.cat((a, torch.zeros(missing, self.k)))
            b = torch.cat((b, torch.zeros(missing, self.n)))
        return a, b.T.contiguous()


@dataclass(frozen=True)
class PackedAdapter:
    """Every site of an adapter, in the order of their names."""

    sites: tuple[PackedSite, ...]

    @property
    def parameters(self) -> int:
        return sum(site.parameters for site in self.sites)

    def tensors(self) -> dict[str, Tensor]:
        """One flat tensor per role: site after site, A before B. Empty roles are left out.

        Thousands of small tensors would spend more on their names than on zero points.
        """
        flat = {
            role: torch.cat([getattr(f, role) for site in self.sites for f in (site.a, site.b)])
            for role in ROLES
        }
        return {role: tensor for role, tensor in flat.items() if tensor.numel()}

    def stored_bits(self) -> int:
        return sum(site.stored_bits() for site in self.sites)


def pack_factor(parts: Sequence[Coded]) -> PackedFactor:
    """Pack directions that lie in order; a run of one width and grid becomes a segment."""
    runs = _runs(parts)
    segments = tuple(Segment(len(run.codes), run.width, run.grid) for run in runs)
    zeros = [
        pack_bits(run.zeros.reshape(-1), int(run.width)) for run in runs if run.zeros is not None
    ]
    return PackedFactor(
        length=runs[0].codes.shape[1],
        group=runs[0].group,
        segments=segments,
        codes=torch.cat([pack_rows(run.codes, width_id(run.width)) for run in runs]),
        scales=torch.cat([run.scales.reshape(-1) for run in runs]),
        zeros=torch.cat(zeros) if zeros else torch.zeros(0, dtype=torch.uint8),
    )


def split_tensors(
    tensors: Mapping[str, Tensor], shapes: Iterable[tuple[int, int, tuple[Segment, ...]]]
) -> list[PackedFactor]:
    """Factors from the flat tensors of `PackedAdapter.tensors`: (length, group, segments) of each.

    Views, no copies. Raises AdapterError when the tensors hold more or less than the factors.
    """
    found, parts = [*shapes], dict[str, tuple[Tensor, ...]]()
    for length, group, segments in found:
        _require_layout(length, group, segments)
    sizes = [_sizes_of_all(segments, length, group) for length, group, segments in found]
    for role in ROLES:
        tensor = tensors.get(role, torch.zeros(0, dtype=DTYPES[role]))
        if tensor.dtype != DTYPES[role]:
            raise AdapterError(f"{role} are {tensor.dtype}, not {DTYPES[role]}")
        counts = [size[role] for size in sizes]
        if tensor.shape != (sum(counts),):
            raise AdapterError(
                f"{role} are {list(tensor.shape)}, the adapter's sites take [{sum(counts)}]"
            )
        parts[role] = tensor.split(counts)
    if "scales" in tensors and not _are_scales(tensors["scales"]):
        raise AdapterError("a scale is negative or not finite")
    return [
        PackedFactor.part(*shape, tensors_of_it)
        for shape, tensors_of_it in zip(found, zip(*parts.values(), strict=True), strict=True)
    ]


def _require_layout(length: int, group: int, segments: tuple[Segment, ...]) -> None:
    if length < 1 or (group < 1 and group != ROW_SCALES) or not segments:
        rank = sum(segment.rows for segment in segments)
        raise AdapterError(
            f"a packed factor [{rank}, {length}]: group {group}, {len(segments)} segments"
        )


def _are_scales(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low >= 0 and high < math.inf)  # false for NaN, too


def _runs(parts: Sequence[Coded]) -> list[Coded]:
    """Neighbours of one width and grid joined; parts without rows left out."""
    runs = list[Coded]()
    for part in parts:
        if not len(part.codes):
            continue
        if runs and (runs[-1].width, runs[-1].grid) == (part.width, part.grid):
            part = _joined(runs.pop(), part)
        runs.append(part)
    return runs


def _joined(first: Coded, second: Coded) -> Coded:
    zeros = None
    if first.zeros is not None and second.zeros is not None:
        zeros = torch.cat((first.zeros, second.zeros))
    codes, scales = (
        torch.cat((getattr(first, name), getattr(second, name))) for name in ("codes", "scales")
    )
    return Coded(codes, scales, zeros, first.width, first.group)


def _total(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = dict.fromkeys(ROLES, 0)
    for size in sizes:
        total = {role: total[role] + size[role] for role in ROLES}
    return total
