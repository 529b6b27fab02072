"""PackedWeight: how one compressed weight is stored.

docs/storage-format.md is the specification; this file, packing.py and
stored_tables.py are its only implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lowra.compiler.compact import PLAIN, Compact, encode_levels, encode_scales, span_of
from lowra.compiler.errors import CheckpointError
from lowra.compiler.packing import (
    FORMATS,
    levels_of,
    pack_nibbles,
    pack_rows,
    panels_of,
    row_order,
    row_words,
    unpack_nibbles,
    width_of,
)
from lowra.compiler.rotation import Rotation
from lowra.compiler.stored_tables import decoded_codebooks, decoded_scales

NO_SCALES = 0
ROW_SCALES = -1

UNROTATED = Rotation()

ROLES = ("codes", "codebooks", "codebook_tops", "scales", "scale_reach", "row_widths")
"""Stored tensors of a site, as suffixes of the module's qualified name; `codebook_tops` and
`scale_reach` are there where codebooks and scales are stored in fewer bits than 16."""


def scale_groups(k: int, group: int) -> int:
    """Scales that one row of `k` weights stores: none, one, or one per `group` columns."""
    if group == NO_SCALES:
        return 0
    return 1 if group == ROW_SCALES else -(-k // group)


@dataclass(frozen=True)
class PackedWeight:
    """A weight [n, k] as stored.

    Invariants, checked on construction:
    - `row_widths` uint8 [n], in original row order: ids of widths, 1, 2, 3, 4, 8, 9 for 1.6, and
      11, 12, 13 for trellis codes of 1, 2, 3 bits, which exclude plain rows of the same width;
    - stored rows are sorted by width, widest first and otherwise in order; those of one width are a
      *panel*;
    - `codes` int32, flat: the panels one after another, each as `pack_rows` makes it;
    - `codebooks` float16, flat: 2^width values (1.6 bits: 3; trellis: twice as many) per panel
      (shared), or per stored row;
    - `scales` float16, flat [n * groups] in stored row order, or None with `group` = 0;
      `group` = -1 is one scale per row, else columns per scale.
    - `encoded`: by role, what is stored in place of `codebooks` and `scales` where these take fewer
      bits (lowra.compiler.compact); the two are then what it decodes to.
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
    encoded: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        for what, right in self._checks():
            if not right:
                raise CheckpointError(f"packed weight [{self.n}, {self.k}]: {what}")

    def _checks(self) -> list[tuple[str, bool]]:
        widths = self.row_widths
        if widths.dtype != torch.uint8 or tuple(widths.shape) != (self.n,):
            return [(f"row widths are {widths.dtype} {list(widths.shape)}, not uint8", False)]
        legal = bool(torch.isin(widths, torch.tensor([*FORMATS], dtype=torch.uint8)).all())
        if not legal:
            return [(f"a row width's id is not one of {sorted(FORMATS)}", False)]
        words = sum(rows * row_words(self.k, id) for id, rows in self.panels)
        bits = [width_of(id) for id, _ in self.panels]
        values = self.codebooks.numel()
        factors = self.codebooks[:0] if self.scales is None else self.scales
        scales = factors.numel()
        block = self.rotation.block
        return [
            ("plain and trellis rows of one width", len(bits) == len({*bits})),
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
        return sum((1 if shared else rows) * levels_of(id) for id, rows in self.panels)

    @cached_property
    def panels(self) -> tuple[tuple[int, int], ...]:
        """(width id, rows) of each panel, widest first."""
        return panels_of(self.row_widths)

    @property
    def rows(self) -> dict[float, int]:
        """Rows of each width, widest first."""
        return {width_of(id): rows for id, rows in self.panels}

    @property
    def shared(self) -> bool:
        """True when the rows of a panel share one codebook."""
        return self.codebooks.numel() == self._codebook_values(True)

    @cached_property
    def order(self) -> Tensor:
        """int32 [n]: original index of each stored row."""
        return row_order(self.row_widths)

    @property
    def compact(self) -> Compact:
        """In how many bits scales and codebook values are stored."""
        codes = self.encoded.get("scales")
        scale_bits = 16
        if codes is not None and self.scales is not None:
            scale_bits = 8 if codes.numel() == self.scales.numel() else 4
        return Compact(scale_bits, 8 if "codebook_tops" in self.encoded else 16)

    @property
    def weights(self) -> int:
        return self.n * self.k

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by role; `row_widths` packed two to a byte."""
        stored = {"codes": self.codes, "codebooks": self.codebooks}
        if self.scales is not None:
            stored["scales"] = self.scales
        stored |= self.encoded
        stored["row_widths"] = self._packed_widths
        return stored

    @cached_property
    def _packed_widths(self) -> Tensor:
        return pack_nibbles(self.row_widths)

    def stored_bits(self) -> int:
        """8 x the bytes of every stored tensor."""
        return 8 * sum(t.numel() * t.element_size() for t in self.tensors().values())

    def code_bits(self) -> float:
        """Bits of the codes alone, without padding: what the LowRA paper counts (section 6.2).

        A ternary code counts as the 1.6 bits that it takes in a word, not as its log2(3) = 1.585.
        """
        return sum(width * rows for width, rows in self.rows.items()) * self.k

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
    if not bool(torch.isin(widths, torch.tensor([*FORMATS], dtype=torch.uint8)).all()):
        raise CheckpointError(f"a row width's id of [{n}, {k}] is not one of {sorted(FORMATS)}")
    try:
        codebooks = decoded_codebooks(stored, widths)
        scales = decoded_scales(stored, n, scale_groups(k, group), group == ROW_SCALES)
    except CheckpointError as error:
        raise CheckpointError(f"packed weight [{n}, {k}]: {error}") from error
    roles = [*(("codebooks", "codebook_tops") if "codebook_tops" in stored else ())]
    roles += [*(("scales", "scale_reach") if "scale_reach" in stored else ())]
    encoded = {role: stored[role] for role in roles}
    return PackedWeight(n, k, widths, stored["codes"], codebooks, scales, group, rotation, encoded)


def encode_tables(
    row_widths: Tensor, codebooks: Tensor, scales: Tensor | None, group: int,
    compact: Compact, span: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What stands in a file for `codebooks` and `scales` (flat, in stored order), by role.

    `span` is the grid of compact scales per row; by default it is taken from the scales.
    """
    stored = {"codebooks": codebooks.to(torch.float16)}
    if compact.codebook_bits == 8:
        parts = [encode_levels(table.view(1, -1)) for table in _tables(row_widths, codebooks)]
        stored["codebooks"] = torch.cat([codes.view(-1) for codes, _ in parts])
        stored["codebook_tops"] = torch.cat([tops for _, tops in parts])
    if scales is None:
        return stored
    stored["scales"] = scales.to(torch.float16)
    if compact.scale_bits == 16:
        return stored
    if group == ROW_SCALES and span is None:
        span = span_of(scales)
    # A single 4-bit scale takes a byte anyway, and a reader could not tell it from one of 8 bits.
    bits = 8 if scales.numel() == 1 else compact.scale_bits
    codes, reach = encode_scales(scales.view(row_widths.numel(), -1), bits, span)
    stored["scales"] = codes.view(-1) if bits == 8 else pack_nibbles(codes.view(-1))
    stored["scale_reach"] = reach
    return stored


def _tables(row_widths: Tensor, codebooks: Tensor) -> list[Tensor]:
    """The codebooks one by one, shared or per row."""
    panels = panels_of(row_widths)
    shared = codebooks.numel() == sum(levels_of(id) for id, _ in panels)
    sizes = [size for id, rows in panels for size in [levels_of(id)] * (1 if shared else rows)]
    return list(codebooks.split(sizes))


def with_tables(weight: PackedWeight, codebooks: Tensor, scales: Tensor | None) -> PackedWeight:
    """The same codes over other codebooks and scales, flat, rounded to what its file stores."""
    stored = encode_tables(weight.row_widths, codebooks, scales, weight.group, weight.compact)
    stored |= {"codes": weight.codes, "row_widths": pack_nibbles(weight.row_widths)}
    return from_tensors(stored, weight.n, weight.k, weight.group, weight.rotation)


def pack_weight(
    codes: Tensor,
    row_widths: Tensor,
    codebooks: Tensor | Mapping[float, Tensor],
    scales: Tensor | None,
    group: int = NO_SCALES,
    rotation: Rotation = UNROTATED,
    compact: Compact = PLAIN,
    span: Tensor | None = None,
) -> PackedWeight:
    """Pack codes into storage; codebooks and scales are rounded to what `compact` stores.

    Parameters: `codes` integers [n, k] and `row_widths` uint8 [n] (ids) in original row order;
    `codebooks` either float [n, >= levels] (one table per row) or {width: float [levels]}
    (shared by a panel); `scales` float [n, groups] in original row order, or None.
    """
    n, k = codes.shape
    row_widths = row_widths.to(torch.uint8)
    order = row_order(row_widths).long()
    words: list[Tensor] = []
    tables: list[Tensor] = []
    start = 0
    for id, rows in panels_of(row_widths):
        index = order[start : start + rows]
        words.append(pack_rows(codes[index], id))
        if isinstance(codebooks, Mapping):
            tables.append(codebooks[width_of(id)].float())
        else:
            tables.append(codebooks[index, : levels_of(id)].float().reshape(-1))
        start += rows
    flat = None if scales is None else scales[order].reshape(-1)
    stored = encode_tables(row_widths, torch.cat(tables), flat, group, compact, span)
    stored |= {"codes": torch.cat(words), "row_widths": pack_nibbles(row_widths)}
    return from_tensors(stored, n, k, group, rotation)
