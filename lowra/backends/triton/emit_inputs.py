"""Source of what is done to inputs: h = x A', an adapter's first product, and the rotation."""

from __future__ import annotations

from lowra.backends.triton.emit_linear import settled, sum_of_parts
from lowra.backends.triton.keys import RotateKey, ShrinkKey
from lowra.backends.triton.overlap import SIGNAL, WAIT

COLUMNS = 128
SHORTEST_SPAN = 256
"""Columns that a program rotates at least."""


def shrink_body(key: ShrinkKey) -> list[str]:
    """hidden [m, rank]; a part takes every `parts`-th run of 128 columns."""
    blocks = key.blocks
    dtype = key.dtype if key.target.backend else "float32"
    exact = ', input_precision="ieee"' if dtype == "float32" else ""
    product = settled(key.target, f"tl.dot(w.to(tl.{dtype}), b.to(tl.{dtype}), acc{exact})")
    store = [
        "at = hidden + rm[None, :] * rank + rn[:, None]",
        "tl.store(at, acc.to(hidden.dtype.element_ty), mask=(rn < rank)[:, None] & token)",
    ]
    return [
        *([WAIT, SIGNAL] if key.signals else []),  # x is there for what comes behind, too
        "part, parts = tl.program_id(2), tl.num_programs(2)",
        f"rn = tl.arange(0, {blocks.rows})",
        f"rm = tl.program_id(1) * {blocks.tokens} + tl.arange(0, {blocks.tokens})",
        "token = (rm < m)[None, :]",
        f"acc = tl.full(({blocks.rows}, {blocks.tokens}), 0.0, tl.float32)",
        f"for start in range(part * {COLUMNS}, k, parts * {COLUMNS}):",
        f"    c = start + tl.arange(0, {COLUMNS})",
        "    mask = (rn < rank)[:, None] & (c < k)[None, :]",
        "    w = tl.load(lora_a + rn[:, None] * k + c[None, :], mask=mask, other=0.0)",
        "    mask = (c < k)[:, None] & token",
        "    b = tl.load(x + rm[None, :] * k + c[:, None], mask=mask, other=0.0)",
        f"    acc = {product}",
        *sum_of_parts(blocks, "token", store),
    ]


def span_of(block: int) -> int:
    return max(block, SHORTEST_SPAN)


def rotate_body(key: RotateKey) -> list[str]:
    """out = H D x, or D H x: sums and differences of pairs, log2(block) times."""
    span = span_of(key.block)
    lines = [
        *([SIGNAL, WAIT] if key.signals else []),
        f"c = tl.program_id(1) * {span} + tl.arange(0, {span})",
        "line = tl.program_id(0).to(tl.int64) * k",
        "v = tl.load(x + line + c, mask=c < k, other=0.0).to(tl.float32)",
    ]
    sign = "v = v * tl.load(signs + c, mask=c < k, other=0.0)"
    half = 1
    steps: list[str] = []
    while half < key.block:
        pairs = f"tl.permute(tl.reshape(v, ({span // (2 * half)}, 2, {half})), (0, 2, 1))"
        steps += [
            f"p, q = tl.split({pairs})",
            f"v = tl.reshape(tl.permute(tl.join(p + q, p - q), (0, 2, 1)), ({span},))",
        ]
        half *= 2
    lines += [*steps, sign] if key.back else [sign, *steps]
    return [*lines, "tl.store(out + line + c, v.to(out.dtype.element_ty), mask=c < k)"]
