"""Error feedback and coordinate descent on codes, for CUDA and ROCm devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowra.backends.reference import feedback as reference
from lowra.backends.triton import launch, service
from lowra.backends.triton.emit_rounding import PANEL
from lowra.backends.triton.keys import Blocks, RoundKey
from lowra.backends.triton.targets import Target
from lowra.compiler.ops import LIBRARY

MOST_SMALL_LEVELS = 16


def feedback_codes(
    weight: Tensor, upper: Tensor | None, tables: Tensor, scales: Tensor | None, columns: Tensor,
    runs: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Codes uint8 [n, k]; see the reference."""
    if upper is None or runs is not None:
        given = (weight, upper, tables, scales, columns, runs)
        return _on_cpu(torch.ops.lowra.feedback_codes, given, weight.device)[0]
    given = (weight, upper, tables, scales, columns)
    return service.serve(
        weight.device, lambda target: fed_back(*given, target),
        lambda: reference.feedback_codes(*given),
    )  # fmt: skip


def descend_codes(
    weight: Tensor, gram: Tensor, tables: Tensor, scales: Tensor | None, columns: Tensor,
    codes: Tensor, slope: Tensor | None, sweeps: int, runs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes uint8 [n, k] and their slope float32 [n, k]; see the reference."""
    if runs is not None:
        given = (weight, gram, tables, scales, columns, codes, slope, sweeps, runs)
        return _on_cpu(torch.ops.lowra.descend_codes, given, weight.device)
    given = (weight, gram, tables, scales, columns, codes, slope, sweeps)
    return service.serve(
        weight.device, lambda target: descended(*given, target),
        lambda: reference.descend_codes(*given),
    )  # fmt: skip


def _on_cpu(op: Callable[..., Any], given: Sequence[Any], device: torch.device) -> Any:
    """What the CPU's kernel gives: a path goes from row to row, which no kernel here does."""
    found = op(*(t.cpu() if isinstance(t, Tensor) else t for t in given))
    return tuple(t.to(device) for t in (found if isinstance(found, tuple) else (found,)))


def fed_back(
    weight: Tensor, upper: Tensor, tables: Tensor, scales: Tensor | None, columns: Tensor,
    target: Target,
) -> Tensor:  # fmt: skip
    """Panel by panel: a kernel within it, one product for all columns behind it."""
    n, k = weight.shape
    w = _transposed(weight)
    panel = _Panel(target, False, upper.T.contiguous(), tables, scales, columns, n)
    codes = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    for start in range(0, k, PANEL):
        changes = panel.run(start, codes, given=w)
        end = start + len(changes)
        w[end:].addmm_(upper[start:end, end:].T, changes, alpha=-1)
    return codes.T.contiguous()


def descended(
    weight: Tensor, gram: Tensor, tables: Tensor, scales: Tensor | None, columns: Tensor,
    codes: Tensor, slope: Tensor | None, sweeps: int, target: Target,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same in turn over all columns; what a panel changes moves the slope of every column."""
    panel = _Panel(target, True, gram.contiguous(), tables, scales, columns, weight.shape[0])
    values = reference.values_of(tables, scales, columns, codes)
    slope = gram @ (weight.T - values) if slope is None else _transposed(slope)
    moved = _transposed(codes)
    for _ in range(sweeps):
        before = moved.clone()
        for start in range(0, weight.shape[1], PANEL):
            changes = panel.run(start, moved, given=slope, values=values)
            slope.addmm_(gram[:, start : start + PANEL], changes, alpha=-1)
        if torch.equal(before, moved):
            break
    return moved.T.contiguous(), slope.T.contiguous()


def _transposed(matrix: Tensor) -> Tensor:
    """A copy to write into."""
    return matrix.T.clone(memory_format=torch.contiguous_format)


class _Panel:
    """The kernel, and what it is given at every panel."""

    def __init__(
        self, target: Target, descends: bool, matrix: Tensor, tables: Tensor,
        scales: Tensor | None, columns: Tensor, n: int,
    ) -> None:  # fmt: skip
        levels = tables.shape[1]
        key = rounding_key(target, descends, scales is not None, levels)
        self.launcher, self.programs = launch.launcher_of(key), -(-n // key.blocks.rows)
        self.changes = torch.empty(PANEL, n, device=tables.device)
        self.given = {
            "matrix": matrix, "tables": tables.contiguous(), "changes": self.changes,
            "scales": None if scales is None else scales.T.contiguous(),
            "columns": columns.contiguous(), "n": n, "k": matrix.shape[0], "levels": levels,
        }  # fmt: skip

    def run(self, first: int, codes: Tensor, **more: Tensor) -> Tensor:
        """The changes [columns, n] of the panel that begins at `first`."""
        given = {**self.given, **more, "codes": codes, "first": first}
        launch.run(self.launcher, (self.programs, 1, 1), given)
        return self.changes[: self.given["k"] - first]


def rounding_key(target: Target, descends: bool, scaled: bool, levels: int) -> RoundKey:
    """Fewer rows to a program where their tables are large. Not timed."""
    padded = max(2, 1 << (levels - 1).bit_length())
    blocks = Blocks(32 if padded <= MOST_SMALL_LEVELS else 16, 0, 4, 1)
    return RoundKey(target, descends, scaled, padded, blocks)


for _kernel in (feedback_codes, descend_codes):
    torch.library.impl(f"lowra::{_kernel.__name__}", "CUDA", _kernel, lib=LIBRARY)
