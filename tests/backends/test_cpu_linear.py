"""The C++ unpacking against its plain-torch meaning, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.backends.cpu import linear, toolchain
from lowra.backends.reference import linear as reference
from lowra.compiler.packing import FORMATS, levels_of, width_of
from lowra.compiler.storage import PackedWeight, pack_weight, scale_groups

pytestmark = pytest.mark.skipif(toolchain.find_compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def drawn(n: int, k: int, group: int, shared: bool, seed: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor([*FORMATS])[torch.randint(6, (n,), generator=generator)]
    levels = torch.tensor([levels_of(id) for id in widths.tolist()])
    codes = torch.randint(256, (n, k), generator=generator) % levels.view(-1, 1)
    tables = torch.randn(n, 264, generator=generator)
    scales = None
    if group != 0:
        scales = torch.rand(n, scale_groups(k, group), generator=generator) + 0.1
    one = {width_of(id): tables[0, id % 8 :][: levels_of(id)] for id in FORMATS}
    books = one if shared else tables
    return pack_weight(codes, widths, books, scales, group)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 60), st.integers(1, 600), st.sampled_from([0, -1, 32, 48, 256]), st.booleans(),
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
