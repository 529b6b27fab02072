"""Text of what a kernel does before its inputs are there: it asks for the codes that it will read.

With programmatic dependent launch a kernel starts while the one ahead of it runs. What that one
writes is to be read after `WAIT` alone; codes change with no kernel, and a prefetch is a hint that
cannot go stale: the second cache holds what memory is to hold.
"""

from __future__ import annotations

from lowra.backends.triton.keys import PanelKey
from lowra.backends.triton.targets import Target

WAIT, SIGNAL = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"
PREFETCH = """\
@triton.jit
def prefetch(place, size_bytes):
    return tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [place.to(tl.int64), size_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit
def prefetch_once(place, size_bytes):
    return tl.inline_asm_elementwise(
        "{.reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; "
        "setp.eq.u32 first, thread, 0; "
        "@first cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;}", "=r,l,r",
        [place.to(tl.int64), size_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )
"""


def prefetches(target: Target, panel: PanelKey) -> bool:
    """Whether there is an instruction for it that takes what rows of this panel begin at."""
    return target.overlaps and panel.aligned == 4


def all_ahead(start: str, size_bytes: str) -> list[str]:
    """Ask for a tile of whole rows, which follow each other from the pointer `start` on."""
    return [f"if {size_bytes} > 0:", f"    prefetch_once({start}, {size_bytes})"]


def part_ahead(
    rows: int, warps: int, lines: str, first: str, last: str, item_bytes: int = 4
) -> list[str]:
    """Ask for items `first` to `last` of every row, but for a few; `lines` [rows, 1]: pointers to
    where rows begin. Every thread asks for a piece."""
    pieces, whole = max(1, 32 * warps // rows), 16 // item_bytes
    return [
        f"piece = ({last} - {first}) // {pieces * whole} * {whole}",
        "if piece > 0:",
        f"    at = {first} + tl.arange(0, {pieces})[None, :] * piece",
        f"    prefetch({lines} + at, piece * {item_bytes})",
    ]
