"""The `lowra::` ops of adapters that lie in pages: schema, shape rule and gradient.

    apply_adapters           y [m, n], x [m, k] -> y + sum over j of w_j (f_j(y) - y)
    apply_adapters_backward  -> dL/dy, dL/dx, dL/dweights

with f_j as in adapter_pages.py. A token has up to J entries (slot, weight); the arguments after x:

    pages     int32 [words]      the pool's memory
    chunks    int32 [c, 7]       `adapter_pages.CHUNK`, of this linear, adapter by adapter
    bounds    int32 [s + 1]      slot j has the chunks bounds[j] to bounds[j + 1]
    scalings  float32 [s]        s_j
    slots     int32 [m, J]       which adapter; -1 is none
    weights   float32 [m, J]     w_j
    rank      int                no A of the chunks has more rows

Slots and addresses are data: another adapter, or another batch, is no other program. A token whose
slots are all -1 gets its y back, bit for bit.
"""

# mypy-style annotations cannot describe a torch.library context: `ctx` stays untyped on purpose.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.compiler.ops import LIBRARY

HELD = (
    "Tensor pages, Tensor chunks, Tensor bounds, Tensor scalings, Tensor slots, Tensor weights, "
    "int rank"
)
LIBRARY.define(f"apply_adapters(Tensor y, Tensor x, {HELD}) -> Tensor")
LIBRARY.define(
    f"apply_adapters_backward(Tensor grad, Tensor y, Tensor x, {HELD}) -> (Tensor, Tensor, Tensor)"
)


def require_rows(y: Tensor, x: Tensor, slots: Tensor, weights: Tensor) -> None:
    """Raise AdapterError unless each row of x and y has one of slots and one of weights, which are
    as wide: kernels read them by the rows of x."""
    shapes = [list(tensor.shape) for tensor in (y, x, slots, weights)]
    if all(len(s) == 2 and s[0] == shapes[0][0] for s in shapes) and shapes[2] == shapes[3]:
        return
    raise AdapterError(
        "apply_adapters takes y [m, n], x [m, k], slots [m, J] and weights [m, J]; given are y "
        f"{shapes[0]}, x {shapes[1]}, slots {shapes[2]}, weights {shapes[3]}"
    )


@torch.library.register_fake("lowra::apply_adapters")
def _(y, x, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(y)


@torch.library.register_fake("lowra::apply_adapters_backward")
def _(grad, y, x, pages, chunks, bounds, scalings, slots, weights, rank):  # type: ignore[no-untyped-def]
    return torch.empty_like(y), torch.empty_like(x), torch.empty_like(weights)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.rank = inputs[-1]


def _grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = torch.ops.lowra.apply_adapters_backward(grad, *ctx.saved_tensors, ctx.rank)
    needs = ctx.needs_input_grad
    to_y, to_x, to_weights = (
        value if needs[place] else None for value, place in zip(found, (0, 1, 7), strict=True)
    )
    return (to_y, to_x, *[None] * 5, to_weights, None)


torch.library.register_autograd("lowra::apply_adapters", _grad, setup_context=_setup)
