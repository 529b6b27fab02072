"""Codebooks and scales that a file stores in fewer bits than 16: checked, then decoded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowra.compiler.compact import decode_levels, decode_scales
from lowra.compiler.errors import CheckpointError
from lowra.compiler.packing import levels_of, panels_of, unpack_nibbles


def decoded_codebooks(stored: Mapping[str, Tensor], row_widths: Tensor) -> Tensor:
    """The codebooks, float16, flat; decoded where `codebook_tops` are there."""
    values, tops = stored["codebooks"], stored.get("codebook_tops")
    if tops is None:
        return values
    _check_reach("codebook_tops", tops)
    panels = panels_of(row_widths)
    for tables in ([1] * len(panels), [rows for _, rows in panels]):
        sizes = [levels_of(id) for (id, _), count in zip(panels, tables, strict=True)
                 for _ in range(count)]  # fmt: skip
        if values.numel() == sum(sizes) and tops.numel() == len(sizes):
            if values.dtype != torch.int8:
                raise CheckpointError(f"codebooks with tops are {values.dtype}, not int8")
            spread = torch.tensor(sizes, device=tops.device)
            return decode_levels(values, tops.repeat_interleave(spread))
    raise CheckpointError(f"{values.numel()} codebook values do not fit {tops.numel()} tops")


def decoded_scales(
    stored: Mapping[str, Tensor], n: int, groups: int, per_row: bool
) -> Tensor | None:
    """The scales, float16, flat; decoded where `scale_reach` is there."""
    codes, reach = stored.get("scales"), stored.get("scale_reach")
    if codes is None or reach is None:
        return codes
    _check_reach("scale_reach", reach)
    count = n * groups
    if codes.dtype != torch.uint8 or codes.dim() != 1 or not count:
        raise CheckpointError(f"scales with a reach are {codes.dtype}, not flat uint8")
    if codes.numel() not in (count, -(-count // 2)) or reach.numel() != (2 if per_row else n):
        raise CheckpointError(f"{codes.numel()} scale codes, {reach.numel()} reaches: not {count}")
    if per_row and not 0 < float(reach[0]) <= float(reach[1]):
        raise CheckpointError(f"scales reach from {float(reach[0])} to {float(reach[1])}")
    bits = 8 if codes.numel() == count else 4
    values = codes if bits == 8 else unpack_nibbles(codes, count)
    return decode_scales(values.view(n, groups), bits, reach, per_row).reshape(-1)


def _check_reach(role: str, values: Tensor) -> None:
    good = values.dtype == torch.float16 and values.dim() == 1
    if not good or not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise CheckpointError(f"{role} are not flat, finite float16 of 0 or more")
