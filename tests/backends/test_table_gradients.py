"""Gradients of codebooks and scales against autograd on a dense weight, in float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.backends.cpu import toolchain
from lowra.backends.reference import linear as reference
from lowra.compiler.rotation import Rotation, rotate
from lowra.compiler.storage import PackedWeight
from tests.backends.test_cpu_product import MIXTURES, Shape, packed_of

ERROR = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def drawn(weight: PackedWeight, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dL/dy [m, n] and x [m, k]."""
    generator = torch.Generator().manual_seed(m)
    return (
        torch.randn(m, weight.n, generator=generator).to(dtype),
        torch.randn(m, weight.k, generator=generator).to(dtype),
    )


def exact(grad: Tensor, x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """By autograd through the plain-torch unpacking, in float64."""
    codes, codebooks, scales, *rest = weight.op_args()
    assert isinstance(codebooks, Tensor)
    leaves = [codebooks.double().requires_grad_()]
    if isinstance(scales, Tensor):
        leaves.append(scales.double().requires_grad_())
    factors = leaves[1] if len(leaves) > 1 else None
    order, panels, k, group, seed, block = rest
    rows = reference.stored_rows(codes, leaves[0], factors, order, panels, k, group, torch.float64)  # pyright: ignore
    y = rotate(x.double(), Rotation(seed, block)) @ rows.T  # pyright: ignore
    got = torch.autograd.grad((y * grad.double()).sum(), leaves)
    return got[0], got[1] if len(got) > 1 else torch.zeros(0, dtype=torch.float64)


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Within a share of the largest: sums of many products of either sign."""
    room = ERROR.get(dtype, 1e-12) * (1 + float(want.abs().max())) if want.numel() else 0
    return got.shape == want.shape and bool(((got.double() - want).abs() <= room).all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_gradients_are_those_of_autograd(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 250)), data.draw(st.integers(1, 700))
    weight = packed_of(Shape(
        n, k, data.draw(st.sampled_from([(2,), (9, 1), *MIXTURES[1:]])),
        data.draw(st.sampled_from([-1, 0, 40])), data.draw(st.booleans()),
        data.draw(st.sampled_from([1, k & -k])), data.draw(st.integers(0, 999)),
    ))  # fmt: skip
    dtype = data.draw(st.sampled_from([*ERROR, torch.float64]))
    grad, x = drawn(weight, data.draw(st.integers(1, 30)), dtype)
    got = torch.ops.lowra.table_gradients(grad, x, *weight.op_args())
    for one, two in zip(got, exact(grad, x, weight), strict=True):
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert close(one, two, dtype)


def test_the_reference_is_exact() -> None:
    for shared, group, widths in product((True, False), (-1, 0, 40), (MIXTURES[1], MIXTURES[3])):
        weight = packed_of(Shape(50, 96, widths, group, shared, 32))
        grad, x = drawn(weight, 9, torch.float32)
        got = reference.table_gradients(grad, x, *weight.op_args())  # pyright: ignore
        for one, two in zip(got, exact(grad, x, weight), strict=True):
            assert close(one, two, torch.float32)


@pytest.mark.skipif(toolchain.find_compiler() is None, reason="no C++ compiler")
def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pieces of rows, too; of the sums alone: the product before them is torch's."""
    from lowra.backends.cpu import pieces

    monkeypatch.setattr(pieces, "PIECE_BYTES", 64 * 300 * 4)
    weight = packed_of(Shape(200, 300, (2, 9, 11)))
    grad, x = (torch.round(8 * t) for t in drawn(weight, 12, torch.float32))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.lowra.table_gradients(grad, x, *weight.op_args()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_tokens_that_are_none_give_zeros() -> None:
    weight = packed_of(Shape(7, 40, (2, 3)))
    grad, x = drawn(weight, 0, torch.float32)
    tables, scales = torch.ops.lowra.table_gradients(grad, x, *weight.op_args())
    assert not tables.any() and not scales.any() and scales.numel() == 7
