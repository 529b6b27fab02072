"""PackedWeight: how one compressed weight is stored, and the exact count of its bits.

docs/storage-format.md is the specification; this file is its only implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowra.compiler.errors import CheckpointError
from lowra.compiler.packing import WIDTHS, pack_rows, row_words
from lowra.compiler.rotation import Rotation

NO_SCALES = 0
ROW_SCALES = -1
ROW_WIDTH_BITS = 4
"""Bits that a row spends on naming its own width."""

UNROTATED = Rotation()

ROLES = ("codes", "codebooks", "scales", "row_widths")
"""Stored tensors of a site, as suffixes of the module's qualified name."""


def scale_groups(k: int, group: int) -> int:
    """Scales that one row of `k` weights stores: none, one, or one per `group` columns."""
    if group == NO_SCALES:
        return 0
    return 1 if group == ROW_SCALES else -(-k // group)


def row_bits(k: int, width: int, group: int, shared: bool) -> int:
    """Stored bits of one row of `width`: codes with padding, scales, own codebook, width tag."""
    codebook = 0 if shared else 16 << width
    return 32 * row_words(k, width) + 16 * scale_groups(k, group) + codebook + ROW_WIDTH_BITS


def site_bits(n: int, widths: tuple[int, ...], shared: bool) -> int:
    """Bits beside the rows: shared codebooks of `widths`, and the odd row's half-empty byte."""
    return (sum(16 << width for width in widths) if shared else 0) + ROW_WIDTH_BITS * (n % 2)


def panels_of(row_widths: Tensor) -> tuple[tuple[int, int], ...]:
    """(width, rows) per panel, widest first, of per-row widths [n]."""
    counts = torch.bincount(row_widths.long(), minlength=9).tolist()
    return tuple((width, counts[width]) for width in sorted(WIDTHS, reverse=True) if counts[width])


def row_order(row_widths: Tensor) -> Tensor:
    """int32 [n]: the original index of each stored row (widest first, else in order)."""
    return torch.argsort(row_widths.long(), descending=True, stable=True).to(torch.int32)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] as stored.

    Invariants, checked on construction:
    - `row_widths` uint8 [n], in original row order, each one of 1, 2, 3, 4, 8;
    - stored rows are sorted by width, widest first and otherwise in order; a run is a *panel*;
    - `codes` int32, flat: the panels one after another, each as `pack_rows` makes it;
    - `codebooks` float16, flat: 2^width values per panel (shared), or per stored row;
    - `scales` float16, flat [n * groups] in stored row order, or None with `group` = 0;
      `group` = -1 is one scale per row, else columns per scale.
    A weight of code c in stored row r is `codebook[c] * scale`, in the coordinates of `rotation`.
    """

    n: int
    k: int
    row_widths: Tensor
    codes: Tensor
    codebooks: Tensor
    scales: Tensor | None
    group: int = NO_SCALES
    rotation: Rotation = UNROTATED

    def __post_init__(self) -> None:
        for what, right in self._checks():
            if not right:
                raise CheckpointError(f"packed weight [{self.n}, {self.k}]: {what}")

    def _checks(self) -> list[tuple[str, bool]]:
        widths = self.row_widths
        if widths.dtype != torch.uint8 or tuple(widths.shape) != (self.n,):
            return [(f"row widths are {widths.dtype} {list(widths.shape)}, not uint8", False)]
        legal = bool(torch.isin(widths, torch.tensor(WIDTHS, dtype=torch.uint8)).all())
        if not legal:
            return [(f"a row width is not one of {WIDTHS}", False)]
        words = sum(rows * row_words(self.k, width) for width, rows in self.panels)
        values = self.codebooks.numel()
        factors = self.codebooks[:0] if self.scales is None else self.scales
        scales = factors.numel()
        block = self.rotation.block
        return [
            ("codes are not int32", self.codes.dtype == torch.int32),
            (f"{self.codes.numel()} code words, not {words}", self.codes.numel() == words),
            ("codebooks are not float16", self.codebooks.dtype == torch.float16),
            ("scales are not float16", factors.dtype == torch.float16),
            ("a codebook value is not finite", bool(torch.isfinite(self.codebooks).all())),
            ("a scale is not finite", bool(torch.isfinite(factors).all())),
            ("a tensor is not flat", self.codes.dim() == 1 and self.codebooks.dim() == 1),
            (
                f"{values} codebook values, neither shared nor one table per row",
                values in (self._codebook_values(True), self._codebook_values(False)),
            ),
            (
                f"{scales} scales for group {self.group}",
                scales == self.n * scale_groups(self.k, self.group),
            ),
            (
                f"rotation block {block} is no power of two dividing {self.k}",
                block > 0 and block & (block - 1) == 0 and self.k % block == 0,
            ),
        ]

    def _codebook_values(self, shared: bool) -> int:
        return sum((1 if shared else rows) << width for width, rows in self.panels)

    @cached_property
    def panels(self) -> tuple[tuple[int, int], ...]:
        """(width, rows) of each panel, widest first."""
        return panels_of(self.row_widths)

    @property
    def shared(self) -> bool:
        """True when the rows of a panel share one codebook."""
        return self.codebooks.numel() == self._codebook_values(True)

    @cached_property
    def order(self) -> Tensor:
        """int32 [n]: original index of each stored row."""
        return row_order(self.row_widths)

    @property
    def weights(self) -> int:
        return self.n * self.k

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by role; `row_widths` packed two to a byte."""
        stored = {"codes": self.codes, "codebooks": self.codebooks}
        if self.scales is not None:
            stored["scales"] = self.scales
        stored["row_widths"] = self._packed_widths
        return stored

    @cached_property
    def _packed_widths(self) -> Tensor:
        return pack_nibbles(self.row_widths)

    def stored_bits(self) -> int:
        """8 x the bytes of every stored tensor."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors().values())

    def code_bits(self) -> int:
        """Bits of the codes alone, without padding: what the LowRA paper counts (section 6.2)."""
        return int(self.row_widths.sum(dtype=torch.int64)) * self.k

    def op_args(self) -> tuple[object, ...]:
        """The packed arguments of every `lowra::` op, in the order of the schema."""
        flat = [value for panel in self.panels for value in panel]
        seed, block = self.rotation.seed, self.rotation.block
        return (
            self.codes, self.codebooks, self.scales, self.order,
            flat, self.k, self.group, seed, block,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [n, k] in original rows and original input coordinates."""
        return torch.ops.lowra.dequantize(*self.op_args(), dtype)


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [n] below 16 into uint8 [ceil(n / 2)], the even index in the low half."""
    padded = torch.zeros(2 * (-(-values.numel() // 2)), dtype=torch.uint8, device=values.device)
    padded[: values.numel()] = values
    return padded[0::2] | (padded[1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_nibbles` for `count` values."""
    return torch.stack((packed & 15, packed >> 4), dim=1).reshape(-1)[:count].contiguous()


def from_tensors(
    stored: Mapping[str, Tensor], n: int, k: int, group: int, rotation: Rotation
) -> PackedWeight:
    """A PackedWeight from its stored tensors by role. Raises CheckpointError on any mismatch."""
    missing = [role for role in ("codes", "codebooks", "row_widths") if role not in stored]
    if missing:
        raise CheckpointError(f"a packed weight [{n}, {k}] lacks {', '.join(missing)}")
    packed_widths = stored["row_widths"]
    if packed_widths.dtype != torch.uint8 or packed_widths.numel() != -(-n // 2):
        raise CheckpointError(f"row widths of [{n}, {k}] hold {packed_widths.numel()} bytes")
    widths = unpack_nibbles(packed_widths, n)
    scales = stored.get("scales")
    return PackedWeight(n, k, widths, stored["codes"], stored["codebooks"], scales, group, rotation)


def pack_weight(
    codes: Tensor,
    row_widths: Tensor,
    codebooks: Tensor | Mapping[int, Tensor],
    scales: Tensor | None,
    group: int = NO_SCALES,
    rotation: Rotation = UNROTATED,
) -> PackedWeight:
    """Pack codes into storage.

    Parameters: `codes` integers [n, k] and `row_widths` uint8 [n] in original row order;
    `codebooks` either float [n, >= 2^width] (one table per row) or {width: float [2^width]}
    (shared by a panel); `scales` float [n, groups] in original row order, or None.
    """
    n, k = codes.shape
    row_widths = row_widths.to(torch.uint8)
    order = row_order(row_widths).long()
    words: list[Tensor] = []
    tables: list[Tensor] = []
    start = 0
    for width, rows in panels_of(row_widths):
        index = order[start : start + rows]
        words.append(pack_rows(codes[index], width))
        if isinstance(codebooks, Mapping):
            tables.append(codebooks[width].to(torch.float16))
        else:
            tables.append(codebooks[index, : 1 << width].to(torch.float16).reshape(-1))
        start += rows
    stored_scales = None if scales is None else scales[order].to(torch.float16).reshape(-1)
    return PackedWeight(
        n, k, row_widths, torch.cat(words), torch.cat(tables), stored_scales, group, rotation
    )
