"""The C++ unpacking against its plain-torch meaning, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.backends.cpu import linear, toolchain
from lowra.backends.reference import linear as reference
from lowra.compiler import half_products
from lowra.compiler.packing import levels_of, width_of
from lowra.compiler.rotation import rotate
from lowra.compiler.storage import PackedWeight, pack_weight, scale_groups
from tests.backends.test_cpu_product import Shape, drawn_codes, packed_of

pytestmark = pytest.mark.skipif(toolchain.find_compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(n: int, k: int, group: int, shared: bool, seed: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    ids = (8, 4, 13, 12, 9, 11) if seed % 2 else (8, 4, 3, 2, 9, 1)
    widths = torch.tensor(ids)[torch.randint(6, (n,), generator=generator)]
    codes = drawn_codes(widths, k, generator)
    tables = torch.randn(n, 264, generator=generator)
    scales = None
    if group != 0:
        scales = torch.rand(n, scale_groups(k, group), generator=generator) + 0.1
    one = {width_of(id): tables[0, id % 8 :][: levels_of(id)] for id in ids}
    books = one if shared else tables
    return pack_weight(codes, widths, books, scales, group)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 600), st.integers(1, 600), st.sampled_from([0, -1, 32, 48, 256]), st.booleans(),
    st.integers(0, 999), st.sampled_from(DTYPES),
)  # fmt: skip
def test_stored_rows(
    n: int, k: int, group: int, shared: bool, seed: int, dtype: torch.dtype
) -> None:
    packed = drawn(n, k, group, shared and group != 0, seed)
    arguments = packed.op_args()[:7]
    got = linear.stored_rows(*arguments, dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    want = reference.stored_rows(*arguments, dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert torch.equal(got, want)


def test_the_ops_reach_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(linear, "prepared", lambda _, name: asked.append(name))
    x = torch.ones(1, 40).bfloat16()
    torch.ops.lowra.quantized_linear(x, *drawn(5, 40, 32, True, 0).op_args(), None)
    assert asked == ["int16", "values", "values"]


@pytest.mark.parametrize("role", range(4))
def test_tensors_of_another_size_are_refused(role: int) -> None:
    """The kernel reads as far as the panels say."""
    arguments = list(drawn(6, 64, 32, False, 1).op_args())
    arguments[role] = arguments[role][:-1]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"a packed weight \[6, 64\] has \d+ .*, not \d+"):
        torch.ops.lowra.dequantize(*arguments, torch.float32)


def test_row_numbers_out_of_range_are_refused() -> None:
    arguments = list(drawn(6, 64, 32, False, 1).op_args())
    arguments[3] = arguments[3] + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="out of range"):
        torch.ops.lowra.dequantize(*arguments, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 32])
def test_without_instructions_for_a_dtype_sums_are_rounded_once(
    dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of many tokens, and all gradients, on a CPU that multiplies only float32 fast."""
    monkeypatch.setattr(half_products, "_slow_dtypes", lambda: frozenset((dtype,)))
    packed = packed_of(Shape(70, 96, (1, 3), 32, shared=True, block=block))
    weight = packed.dequantize(torch.float64)
    x, a, b, grad = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, shape in enumerate([(300, 96), (4, 96), (70, 4), (300, 70)])
    )
    inputs = [t.clone().requires_grad_() for t in (x, a, b)]
    books = packed.codebooks.clone().requires_grad_()
    arguments = (packed.op_args()[0], books, *packed.op_args()[2:])
    y = torch.ops.lowra.quantized_linear_lora(inputs[0], *arguments, None, *inputs[1:], 0.5)
    found = (y, *torch.autograd.grad(y, (*inputs, books), grad))
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    tables = packed.codebooks.double().requires_grad_()
    dense = reference.stored_rows(arguments[0], tables, *arguments[2:7], torch.float64)
    assert torch.allclose(dense, rotate(weight, packed.rotation), atol=1e-6)
    turned = rotate(wide[0], packed.rotation)
    exact = turned @ dense.T + 0.5 * wide[0] @ wide[1].T @ wide[2].T
    wanted = (exact, *torch.autograd.grad(exact, (*wide, tables), grad.double()))
    # Inputs of 1 x 32 rotations are rounded once more, and so are their gradients.
    limit = torch.finfo(dtype).eps * (0.32 if block == 1 else 0.4)
    for name, got, want in zip(("y", "x", "A", "B", "tables"), found, wanted, strict=True):
        distance = float((got.detach().double() - want.detach()).norm() / want.detach().norm())
        assert distance < limit, f"{name}: {distance}"
