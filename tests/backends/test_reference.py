"""The reference backend against dense float64 products; gradients; what backward keeps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowra.backends.reference  # noqa: F401 - the ops get their meaning
from lowra.backends.reference import embedding
from lowra.compiler.storage import PackedWeight
from tests.compiler.packed_weights import Case, cases, packed_with_dense

OPS = torch.ops.lowra
# Error as a share of |x| |w|, where weights, rotated inputs and sums are rounded to the dtype.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
ROTATED = Case(row_widths=(4, 2, 1, 8, 3, 2, 4), k=96, group=32, block=32, seed=5)
PLAIN = Case(row_widths=(2, 4, 3), k=33, group=-1, shared=True)


def lora_of(case: Case, rank: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """bias [n], A [r, k], B [n, r] in float32."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    a = torch.randn(rank, case.k, generator=generator) / case.k**0.5
    return torch.randn(case.n, generator=generator), a, torch.randn(case.n, rank)


def dense_product(
    x: Tensor, dense: Tensor, bias: Tensor, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    x = x.double()
    return x @ dense.T + bias.double() + scaling * (x @ a.double().T) @ b.double().T


def assert_near(got: Tensor, want: Tensor, x: Tensor, dense: Tensor) -> None:
    room = x.double().norm(dim=-1, keepdim=True) * dense.norm(dim=1) + want.abs() + 1e-30
    worst = float(((got.double() - want).abs() / room).max()) if got.numel() else 0.0
    assert worst <= TOLERANCE[x.dtype], f"{worst:.2e} of |x| |w| in {x.dtype}"


def plain_and_lora(x: Tensor, packed: PackedWeight, dense: Tensor, case: Case) -> None:
    """Both linear ops against the dense product."""
    bias, a, b = lora_of(case)
    bias, a, b = (t.to(x.dtype) for t in (bias, a, b))
    nothing = torch.zeros_like(b)
    y = OPS.quantized_linear(x, *packed.op_args(), bias)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], packed.n)
    assert_near(y, dense_product(x, dense, bias, a, nothing, 0.0), x, dense)
    y = OPS.quantized_linear_lora(x, *packed.op_args(), bias, a, b, 0.5)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], packed.n)
    full = dense + 0.5 * b.double() @ a.double()
    assert_near(y, dense_product(x, dense, bias, a, b, 0.5), x, full.abs() + dense.abs())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(most_columns=140), st.sampled_from(list(TOLERANCE)), st.integers(0, 5))
def test_linears_equal_the_dense_product(case: Case, dtype: torch.dtype, m: int) -> None:
    packed, dense = packed_with_dense(case)
    x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m)).to(dtype)
    plain_and_lora(x, packed, dense, case)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [0, -1, 32])
@pytest.mark.parametrize("shared", [False, True], ids=["per row", "shared"])
@pytest.mark.parametrize("block", [1, 32])
def test_every_kind_of_storage_in_every_dtype(
    dtype: torch.dtype, group: int, shared: bool, block: int
) -> None:
    case = Case((4, 1, 2, 3, 2, 8, 4), 96, group, shared, block, seed=2)
    packed, dense = packed_with_dense(case)
    plain_and_lora(torch.randn(3, 96).to(dtype), packed, dense, case)


SHAPES: dict[str, Any] = {
    "one axis": lambda k: torch.randn(k),
    "three axes": lambda k: torch.randn(2, 3, k),
    "no tokens": lambda k: torch.randn(0, k),
    "no batch": lambda k: torch.randn(2, 0, k),
    "transposed": lambda k: torch.randn(k, 5).T,
    "every other token": lambda k: torch.randn(6, k)[::2],
    "part of a wider row": lambda k: torch.randn(4, 2 * k)[:, 3 : 3 + k],
    "one token repeated": lambda k: torch.randn(1, k).expand(4, k),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", [ROTATED, PLAIN], ids=["rotated", "plain"])
def test_inputs_of_every_layout(shape: str, case: Case) -> None:
    packed, dense = packed_with_dense(case)
    plain_and_lora(SHAPES[shape](case.k), packed, dense, case)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_every_layout_have_gradients(shape: str) -> None:
    packed, dense = packed_with_dense(ROTATED)
    bias, a, b = (t.requires_grad_() for t in lora_of(ROTATED))
    x = SHAPES[shape](ROTATED.k).requires_grad_()
    inputs = (x, bias, a, b)
    y = OPS.quantized_linear_lora(x, *packed.op_args(), bias, a, b, 0.5)
    got = torch.autograd.grad(y.square().sum(), inputs)
    y = x @ dense.float().T + bias + 0.5 * (x @ a.T) @ b.T
    for mine, theirs in zip(got, torch.autograd.grad(y.square().sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-2)


def test_missing_bias_is_zero() -> None:
    packed, dense = packed_with_dense(ROTATED)
    x = torch.randn(2, 96, dtype=torch.float64)
    y = OPS.quantized_linear(x, *packed.op_args(), None)
    torch.testing.assert_close(y, x @ dense.T, rtol=1e-10, atol=1e-10)


def test_factors_of_another_dtype_are_cast_to_that_of_x() -> None:
    packed, dense = packed_with_dense(PLAIN)
    bias, a, b = lora_of(PLAIN)
    x = torch.randn(4, 33).bfloat16()
    y = OPS.quantized_linear_lora(x, *packed.op_args(), bias, a, b, 2.0)
    assert y.dtype == torch.bfloat16
    full = dense.abs() + 2 * b.double().abs() @ a.double().abs()
    assert_near(y, dense_product(x, dense, bias, a, b, 2.0), x, full)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_rows_of_a_weight_are_those_of_the_whole_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    packed, _ = packed_with_dense(case)
    ids = torch.randint(case.n, (2, 3), generator=torch.Generator().manual_seed(case.seed))
    whole = OPS.dequantize(*packed.op_args(), dtype)
    rows = embedding.few_rows(ids, *packed.op_args(), dtype)
    assert rows.dtype == dtype and torch.equal(rows, whole[ids])
    assert OPS.embedding(ids[:0], *packed.op_args(), dtype).shape == (0, 3, case.k)


def test_gradients_of_looked_up_rows_are_those_of_the_whole_weight() -> None:
    codes, books, scales, *layout = packed_with_dense(ROTATED)[0].op_args()
    ids = torch.tensor([[1, 0, 1]])
    grads = []
    for rows in (
        lambda *packed: OPS.embedding(ids, *packed, torch.float64),
        lambda *packed: OPS.dequantize(*packed, torch.float64)[ids],
    ):
        tables = [t.double().requires_grad_() for t in (books, scales)]
        (rows(codes, *tables, *layout) ** 2).sum().backward()
        grads.append([t.grad for t in tables])
    for got, want in zip(*grads, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("look_up", [OPS.embedding, embedding.few_rows], ids=["op", "few"])
@pytest.mark.parametrize("id", [-1, PLAIN.n])
def test_an_id_that_is_no_row_is_refused(id: int, look_up: Any) -> None:
    packed, _ = packed_with_dense(PLAIN)
    with pytest.raises(IndexError):
        look_up(torch.tensor([0, id]), *packed.op_args(), torch.float32)


# --- the contract of torch.library ----------------------------------------------------------------


def op_inputs(case: Case, train: bool) -> dict[str, tuple[Any, ...]]:
    """Arguments of the ops; `train` asks for every gradient."""
    packed, _ = packed_with_dense(case)
    codes, codebooks, scales, *layout = packed.op_args()
    if train:
        codebooks = codebooks.clone().requires_grad_()  # type: ignore[attr-defined]
        scales = None if scales is None else scales.clone().requires_grad_()  # type: ignore
    tables = (codes, codebooks, scales, *layout)
    bias, a, b = (t.requires_grad_(train) for t in lora_of(case))
    x = torch.randn(2, 2, case.k, requires_grad=train)
    return {
        "dequantize": (*tables, torch.float32),
        "embedding": (torch.tensor([[1, 0], [1, 1]]), *tables, torch.float32),
        "dequantize_backward": (torch.randn(case.n, case.k), *packed.op_args()),
        "quantized_linear": (x, *tables, bias),
        "quantized_linear_lora": (x, *tables, bias, a, b, 0.5),
    }


@pytest.mark.parametrize("op", op_inputs(PLAIN, train=False))
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
def test_ops_pass_opcheck(op: str, train: bool) -> None:
    case = ROTATED if train else PLAIN
    torch.library.opcheck(getattr(OPS, op).default, op_inputs(case, train)[op])


@pytest.mark.parametrize("op", op_inputs(PLAIN, train=False))
def test_ops_without_scales_and_bias_pass_opcheck(op: str) -> None:
    arguments = op_inputs(Case((2, 1), 32), train=False)[op]
    if op.startswith("quantized_linear"):
        arguments = (*arguments[:10], None, *arguments[11:])
    kinds = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(OPS, op).default, arguments, test_utils=kinds)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("shared", [False, True], ids=["per row", "shared"])
@pytest.mark.parametrize("group", [0, -1, 20])
def test_gradients_equal_finite_differences(group: int, shared: bool, block: int) -> None:
    case = Case((2, 1, 3, 2), 48, group, shared, block, seed=3)
    packed, _ = packed_with_dense(case)
    codes, codebooks, scales, *layout = packed.op_args()
    tables = [t.double().requires_grad_() for t in (codebooks, scales) if t is not None]  # type: ignore
    bias, a, b = (t.double().requires_grad_() for t in lora_of(case, rank=2))
    x = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)

    def packed_of(*values: Tensor) -> tuple[Any, ...]:
        return (codes, values[0], values[1] if len(values) > 1 else None, *layout)

    def plain(x: Tensor, bias: Tensor, *values: Tensor) -> Tensor:
        return OPS.quantized_linear(x, *packed_of(*values), bias)

    def lora(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, *values: Tensor) -> Tensor:
        return OPS.quantized_linear_lora(x, *packed_of(*values), bias, a, b, 0.7)

    def dense(*values: Tensor) -> Tensor:
        return OPS.dequantize(*packed_of(*values), torch.float64)

    assert torch.autograd.gradcheck(plain, (x, bias, *tables), fast_mode=True)
    assert torch.autograd.gradcheck(lora, (x, bias, a, b, *tables), fast_mode=True)
    assert torch.autograd.gradcheck(dense, tables, fast_mode=True)


def test_gradients_come_only_to_what_asks_for_them() -> None:
    packed, dense = packed_with_dense(ROTATED)
    codes, codebooks, scales, *layout = packed.op_args()
    names = ("x", "codebooks", "scales", "bias", "a", "b")
    for asking in itertools.combinations(names, 2):
        bias, a, b = lora_of(ROTATED)
        values = dict(zip(names, (torch.randn(2, 96), codebooks, scales, bias, a, b), strict=True))
        given = {name: t.clone().requires_grad_(name in asking) for name, t in values.items()}  # type: ignore
        y = OPS.quantized_linear_lora(
            given["x"], codes, given["codebooks"], given["scales"], *layout,
            given["bias"], given["a"], given["b"], 0.5,
        )  # fmt: skip
        y.sum().backward()
        assert {name for name, t in given.items() if t.grad is not None} == set(asking)
        for name in asking:
            assert given[name].grad.dtype == given[name].dtype  # type: ignore[union-attr]


def test_gradients_have_the_dtype_of_their_input_under_mixed_precision() -> None:
    packed, _ = packed_with_dense(ROTATED)
    bias, a, b = (t.requires_grad_() for t in lora_of(ROTATED))
    x = torch.randn(4, 96, dtype=torch.bfloat16, requires_grad=True)
    OPS.quantized_linear_lora(x, *packed.op_args(), bias, a, b, 0.5).sum().backward()
    assert [t.grad.dtype for t in (x, bias, a, b)] == [torch.bfloat16, *[torch.float32] * 3]  # type: ignore


@pytest.mark.parametrize("op", ["quantized_linear", "quantized_linear_lora"])
def test_backward_keeps_nothing_but_the_inputs_of_the_op(op: str) -> None:
    """No dequantised weight, and no rotated input, waits for backward."""
    arguments = op_inputs(ROTATED, train=True)[op]
    given = {value.data_ptr() for value in arguments if isinstance(value, Tensor)}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = getattr(OPS, op)(*arguments)
    assert kept and all(tensor.data_ptr() in given for tensor in kept)
    y.sum().backward()


def test_frozen_tables_do_not_keep_the_input() -> None:
    """Without LoRA and with frozen tables the gradient of x needs no x."""
    packed, _ = packed_with_dense(PLAIN)
    x = torch.randn(4, 33, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t
    ):
        OPS.quantized_linear(x, *packed.op_args(), None)
    assert x.data_ptr() not in kept
