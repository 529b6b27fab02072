"""Attention in plain products against torch's op of CPUs: values, gradients, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowra.compiler.attention import attention, attention_gradients

OP = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def case(mask: str, dtype: torch.dtype, large: float = 1.0) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v as views of [b, l, h, e], and what else the op is given."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        (large * torch.randn(2, 9, 3, 8, generator=generator)).to(dtype).transpose(1, 2)
        for _ in "qkv"
    ]
    if mask == "none":
        return tensors, {"scale": 0.3}
    allowed = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    if mask == "padded":
        allowed[0, :, :, :2] = False  # the first queries may look at nothing
    return tensors, {"attn_mask": torch.where(allowed, 0.0, -torch.inf).to(dtype)}


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """For inputs of `dtype`, in which the op rounds in between."""
    error = float((got.double() - want.double()).norm())
    return got.dtype == want.dtype and error <= LIMIT[dtype] * float(want.double().norm())


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("mask", ["none", "causal", "masked", "padded"])
def test_values_gradients_and_layouts_are_those_of_the_op(mask: str, dtype: torch.dtype) -> None:
    (q, k, v), more = case("none" if mask == "causal" else mask, dtype)
    out, sums = attention(q, k, v, 0.0, mask == "causal", **more)
    want, want_sums = OP(q, k, v, 0.0, mask == "causal", **more)
    assert close(out, want, dtype) and close(sums, want_sums, dtype)
    assert (out.stride(), sums.stride()) == (want.stride(), want_sums.stride())
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = (grad, q, k, v, want, want_sums, 0.0, mask == "causal")
    found, exact = attention_gradients(*given, **more), BACKWARD(*given, **more)
    for got, wanted in zip(found, exact, strict=True):
        assert close(got, wanted, dtype) and got.stride() == wanted.stride()


def test_large_values_of_half_precision_do_not_overflow() -> None:
    (q, k, v), _ = case("none", torch.float16, large=300.0)
    out, _ = attention(q, k, v)
    assert close(out, OP(q, k, v)[0], torch.float16)


def test_fewer_heads_of_keys_serve_neighbours() -> None:
    (q, k, v), _ = case("none", torch.float32)
    q = torch.cat((q, q.flip(1)), 1)
    out, _ = attention(q, k, v, 0.0, True)
    assert close(out, OP(q, k, v, 0.0, True)[0], torch.float32)
