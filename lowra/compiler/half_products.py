"""Products of half-precision matrices on a CPU that has no instructions for them.

There (x86 without AVX-512) torch multiplies bfloat16 one scalar at a time: 7 times slower than
float32 forward and 50 to 100 times backward, measured on one AVX2 machine on 2026-11-27.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_PRODUCTS = frozenset({
    _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default,
    _ATEN.linear.default, _ATEN.matmul.default,
})  # fmt: skip
_ATTENTION_GRADIENT = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default
"""Its forward is fast in any dtype."""


def half_products(model: nn.Module | None = None) -> AbstractContextManager[Any]:
    """Within it, products of matrices in a dtype that this CPU has no instructions for are computed
    in float32 and rounded once, which is what CPUs that have them do; gradients too.

    Nothing happens where the CPU has them, to tensors on other devices, and for a `model` that lies
    on another one: what intercepts ops takes time. Ops of `lowra::` do so everywhere.
    """
    first = None if model is None else next(model.parameters(), None)
    elsewhere = first is not None and first.device.type != "cpu"
    return nullcontext() if elsewhere or not _slow_dtypes() else _Float32Products()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """In what dtype to multiply by `tensor`: its own, or float32 where the CPU that it is on has no
    instructions for that."""
    return torch.float32 if _is_slow(tensor) else tensor.dtype


@functools.cache
def _slow_dtypes() -> frozenset[torch.dtype]:
    """The half-precision dtypes that torch has no kernels for on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    known = torch.ops.mkldnn
    fast = {
        torch.bfloat16: known._is_mkldnn_bf16_supported(),
        torch.float16: known._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in fast.items() if not supported)


class _Float32Products(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION_GRADIENT and _is_slow(args[0]):
            found = func(*map(_wide, args), **{name: _wide(a) for name, a in kwargs.items()})
            return tuple(gradient.to(args[0].dtype) for gradient in found)
        tensors = [a for a in args if isinstance(a, Tensor)] if func in _PRODUCTS else []
        if tensors and all(map(_is_slow, tensors)):
            return func(*map(_wide, args), **kwargs).to(tensors[0].dtype)
        return func(*args, **kwargs)


def _wide(argument: Any) -> Any:
    return argument.float() if isinstance(argument, Tensor) and _is_slow(argument) else argument


def _is_slow(tensor: Tensor) -> bool:
    return tensor.dtype in _slow_dtypes() and tensor.device.type == "cpu"
