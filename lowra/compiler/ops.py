"""The `lowra::` dialect: schema, shape rule and gradient of each op.

The plain-torch meaning lives in `lowra.backends.reference`; other backends register kernels for
the same names. Every op takes the packed arguments of `PackedWeight.op_args`:

    codes int32, codebooks float16, scales float16 or None, order int32 [n] (original index of each
    stored row), panels [width id, rows, ...], k, group, and the input rotation's seed and block.

    dequantize             -> W [n, k]
    embedding              ids int64 [...] -> W[ids] [..., k]
    dequantize_backward    dL/dW [n, k] -> dL/dcodebooks, dL/dscales
    table_gradients        dL/dy [m, n], x [m, k] -> the same, for y = x W'
    quantized_linear       x [..., k] -> x W' + bias
    input_gradient         dL/dy [..., n] -> dL/dx = dL/dy W, for frozen codebooks and scales
    quantized_linear_lora  x [..., k] -> x W' + bias + scaling * (x A') B',  A [r, k], B [n, r]
"""

# mypy-style annotations cannot describe a torch.library context: `ctx` stays untyped on purpose.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.half_products import product_dtype

PACKED = (
    "Tensor codes, Tensor codebooks, Tensor? scales, Tensor order, "
    "int[] panels, int k, int group, int seed, int block"
)
PACKED_COUNT = 9
LIBRARY = torch.library.Library("lowra", "DEF")
LIBRARY.define(f"dequantize({PACKED}, ScalarType dtype) -> Tensor")
LIBRARY.define(f"embedding(Tensor ids, {PACKED}, ScalarType dtype) -> Tensor")
LIBRARY.define(f"dequantize_backward(Tensor grad, {PACKED}) -> (Tensor, Tensor)")
LIBRARY.define(f"table_gradients(Tensor grad, Tensor x, {PACKED}) -> (Tensor, Tensor)")
LIBRARY.define(f"quantized_linear(Tensor x, {PACKED}, Tensor? bias) -> Tensor")
LIBRARY.define(
    f"quantized_linear_lora(Tensor x, {PACKED}, Tensor? bias, "
    "Tensor lora_a, Tensor lora_b, float scaling) -> Tensor"
)

LIBRARY.define(f"input_gradient(Tensor grad, {PACKED}) -> Tensor")

Direct = Callable[
    [Tensor, tuple[Any, ...], Tensor | None, tuple[Tensor, Tensor, float] | None], Tensor
]
DIRECT: dict[str, Direct] = {}
"""By device type: what computes both linear ops, for calls that nobody watches (`linear`)."""

LINEAR_OPS = ("quantized_linear", "quantized_linear_lora")


@torch.library.register_fake("lowra::dequantize")
def _(codes, codebooks, scales, order, panels, k, group, seed, block, dtype):  # type: ignore[no-untyped-def]
    return codebooks.new_empty((order.shape[0], k), dtype=dtype)


@torch.library.register_fake("lowra::embedding")
def _(ids, codes, codebooks, scales, order, panels, k, group, seed, block, dtype):  # type: ignore[no-untyped-def]
    return codebooks.new_empty((*ids.shape, k), dtype=dtype)


@torch.library.register_fake("lowra::dequantize_backward")
def _(grad, codes, codebooks, scales, *rest):  # type: ignore[no-untyped-def]
    return _like_tables(grad, codebooks, scales)


@torch.library.register_fake("lowra::table_gradients")
def _(grad, x, codes, codebooks, scales, *rest):  # type: ignore[no-untyped-def]
    return _like_tables(grad, codebooks, scales)


def _like_tables(grad: Tensor, codebooks: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32, or float64 where the gradient is: sums of many products."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    shape = (0,) if scales is None else scales.shape
    return codebooks.new_empty(codebooks.shape, dtype=dtype), codebooks.new_empty(
        shape, dtype=dtype
    )


@torch.library.register_fake("lowra::quantized_linear")
def _(x, codes, codebooks, scales, order, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], order.shape[0]))


@torch.library.register_fake("lowra::quantized_linear_lora")
def _(x, codes, codebooks, scales, order, *rest):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], order.shape[0]))


@torch.library.register_fake("lowra::input_gradient")
def _(grad, codes, codebooks, scales, order, panels, k, *rest):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], k))


def _save(ctx: Any, packed: tuple[Any, ...], *extra: Tensor | None) -> None:
    ctx.save_for_backward(*packed[:4], *extra)
    ctx.layout = packed[4:]


def _restore(ctx: Any) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Packed arguments, and what else was saved; read once, as checkpointing demands."""
    saved = ctx.saved_tensors
    return (*saved[:4], *ctx.layout), saved[4:]


def _asked(
    grads: tuple[Tensor, Tensor], packed: tuple[Any, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of codebooks and scales in their dtypes, where `needs` (of codes, codebooks,
    scales) asks."""
    codebooks, scales = packed[1:3]
    return (
        grads[0].to(codebooks.dtype) if needs[1] else None,
        grads[1].to(scales.dtype) if needs[2] else None,
    )


def _dequantize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs[:PACKED_COUNT])


def _dequantize_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed, needs = _restore(ctx)[0], ctx.needs_input_grad[:3]
    tables, scales = None, None
    if needs[1] or needs[2]:
        tables, scales = _asked(torch.ops.lowra.dequantize_backward(grad, *packed), packed, needs)
    return (None, tables, scales, *[None] * 7)


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs[1 : 1 + PACKED_COUNT], inputs[0])


def _embedding_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed, (ids,)), needs = _restore(ctx), ctx.needs_input_grad
    tables, scales = None, None
    if needs[2] or needs[3]:
        dense = grad.new_zeros(packed[3].shape[0], packed[5])
        dense.index_add_(0, ids.reshape(-1), grad.reshape(-1, packed[5]))
        grads = torch.ops.lowra.dequantize_backward(dense, *packed)
        tables, scales = _asked(grads, packed, needs[1:4])
    return (None, None, tables, scales, *[None] * 7)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    needs_x = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    _save(ctx, inputs[1 : 1 + PACKED_COUNT], inputs[0] if needs_x else None)


def _linear_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed, (x,)), needs = _restore(ctx), ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = torch.ops.lowra.input_gradient(grad, *packed) if needs[0] else None
    tables, scales = None, None
    if needs[2] or needs[3]:
        grads = torch.ops.lowra.table_gradients(rows, x.reshape(-1, x.shape[-1]), *packed)
        tables, scales = _asked(grads, packed, needs[1:4])
    grad_bias = rows.sum(0) if needs[10] else None
    return (grad_x, None, tables, scales, *[None] * 6, grad_bias)


def _input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs[1 : 1 + PACKED_COUNT])


def _input_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    packed = _restore(ctx)[0]
    return (torch.ops.lowra.quantized_linear(grad, *packed, None), *[None] * PACKED_COUNT)


def _lora_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, (lora_a, lora_b, scaling) = inputs[0], inputs[11:]
    _save(ctx, inputs[1 : 1 + PACKED_COUNT], x, lora_a, lora_b)
    ctx.scaling = scaling


def _lora_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (packed, (x, lora_a, lora_b)), needs = _restore(ctx), ctx.needs_input_grad
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    dtype = product_dtype(grad)
    wide, wide_inputs = rows.to(dtype), inputs.to(dtype)
    grad_h = (wide @ lora_b.to(dtype)) * ctx.scaling
    grad_x = None
    if needs[0]:
        grad_x = torch.ops.lowra.input_gradient(grad, *packed) + (grad_h @ lora_a.to(dtype)).view(
            x.shape
        ).to(grad.dtype)
    tables, scales = None, None
    if needs[2] or needs[3]:
        grads = torch.ops.lowra.table_gradients(rows, inputs, *packed)
        tables, scales = _asked(grads, packed, needs[1:4])
    grad_bias = rows.sum(0) if needs[10] else None
    grad_a = (grad_h.T @ wide_inputs).to(lora_a.dtype) if needs[11] else None
    hidden = wide_inputs @ lora_a.to(dtype).T
    grad_b = ((wide.T @ hidden) * ctx.scaling).to(lora_b.dtype) if needs[12] else None
    return (grad_x, None, tables, scales, *[None] * 6, grad_bias, grad_a, grad_b, None)


torch.library.register_autograd(
    "lowra::dequantize", _dequantize_grad, setup_context=_dequantize_setup
)
torch.library.register_autograd("lowra::embedding", _embedding_grad, setup_context=_embedding_setup)
torch.library.register_autograd(
    "lowra::quantized_linear", _linear_grad, setup_context=_linear_setup
)
torch.library.register_autograd(
    "lowra::quantized_linear_lora", _lora_grad, setup_context=_lora_setup
)
torch.library.register_autograd("lowra::input_gradient", _input_grad, setup_context=_input_setup)


def linear(
    x: Tensor, packed: tuple[Any, ...], bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None,
) -> Tensor:  # fmt: skip
    """`quantized_linear`, or with (A, B, scaling) `quantized_linear_lora`.

    The way through the dispatcher costs more than the product of a small layer and one token does;
    where no gradient is wanted and nothing traces or intercepts ops, the backend is called at once.
    """
    direct = DIRECT.get("cpu" if x.is_cpu else x.device.type)
    if direct is not None and _unwatched(x):
        return direct(x, packed, bias, factors)
    if factors is None:
        return torch.ops.lowra.quantized_linear(x, *packed, bias)
    return torch.ops.lowra.quantized_linear_lora(x, *packed, bias, *factors)


def _unwatched(x: Tensor) -> bool:
    """Whether nothing stands between this call and a backend: no gradient, tracing or mode."""
    c: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and c._len_torch_dispatch_stack() == 0
        and c._len_torch_function_stack() == 0
        and c._functorch.peek_interpreter_stack() is None
        and not c._is_tracing()
        and not c._autograd._profiler_enabled()
    )
