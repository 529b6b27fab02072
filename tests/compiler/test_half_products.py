"""Products of half-precision matrices in float32, on CPUs that lack instructions for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lowra.compiler import half_products as module
from lowra.compiler.capture import capture
from lowra.compiler.half_products import half_products
from lowra.compiler.pipeline import Pass, run_pipeline
from lowra.compiler.program import Program
from lowra.workflows.evaluate import evaluate
from tests import models

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def no_instructions() -> Iterator[None]:
    """Every CPU is one without instructions for either dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_slow_dtypes", lambda: frozenset(HALF))
        yield


def draw(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_once_rounded(found: Tensor, exact: Tensor) -> None:
    """`found` is a sum in float32, rounded to its dtype at the end."""
    torch.testing.assert_close(
        found.double(), exact, rtol=torch.finfo(found.dtype).eps * 0.51,
        atol=1e-5 * float(exact.abs().max()),
    )  # fmt: skip


@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 70),
    st.sampled_from(HALF), st.integers(0, 999),
)  # fmt: skip
def test_products_and_their_gradients_are_rounded_once(
    m: int, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    x = draw(seed, m, k, dtype=dtype).requires_grad_()
    weight = draw(seed + 1, n, k, dtype=dtype).requires_grad_()
    bias, grad = draw(seed + 2, n, dtype=dtype), draw(seed + 3, m, n, dtype=dtype)
    with half_products():
        y = functional.linear(x, weight, bias)
        found = torch.autograd.grad(y, (x, weight), grad)
    wide = [t.detach().double() for t in (x, weight, bias, grad)]
    exact = (wide[0] @ wide[1].T + wide[2], wide[3] @ wide[1], wide[3].T @ wide[0])
    for got, wanted in zip((y, *found), exact, strict=True):
        assert got.dtype == dtype
        assert_once_rounded(got, wanted)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gradients", [False, True])
def test_every_product_of_the_list_is_taken(dtype: torch.dtype, gradients: bool) -> None:
    a, b = draw(1, 3, 5, 200, dtype=dtype), draw(2, 3, 200, 4, dtype=dtype)
    products = {
        "bmm": lambda: torch.bmm(a, b),
        "matmul": lambda: a @ b[0],
        "addmm": lambda: torch.addmm(a[0, :, :4], a[0], b[0], beta=0.5, alpha=2.0),
        "baddbmm": lambda: torch.baddbmm(a[:, :, :4], a, b),
    }
    wide_a, wide_b = a.double(), b.double()
    exact = {
        "bmm": wide_a @ wide_b,
        "matmul": wide_a @ wide_b[0],
        "addmm": 0.5 * wide_a[0, :, :4] + 2 * wide_a[0] @ wide_b[0],
        "baddbmm": wide_a[:, :, :4] + wide_a @ wide_b,
    }
    for name, product in products.items():
        with torch.set_grad_enabled(gradients), half_products():
            found = product()
        assert_once_rounded(found, exact[name])


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention_are_computed_in_float32(masked: bool) -> None:
    mask = draw(9, 33, 33, dtype=torch.bfloat16) if masked else None

    def run(dtype: torch.dtype) -> list[Tensor]:
        inputs = [draw(i, 1, 2, 33, 16, dtype=torch.bfloat16).to(dtype) for i in range(3)]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        given = None if mask is None else mask.to(dtype)
        out = functional.scaled_dot_product_attention(
            inputs[0], inputs[1], inputs[2], given, is_causal=not masked
        )
        grad = draw(8, 1, 2, 33, 16, dtype=torch.bfloat16).to(dtype)
        return list(torch.autograd.grad(out, inputs, grad))

    with half_products():
        found = run(torch.bfloat16)
    native = run(torch.bfloat16)
    for got, own, exact in zip(found, native, run(torch.float64), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - exact).norm() <= 1.02 * (own - exact).norm()
        # The output, rounded, is an input of its gradient.
        assert (got - exact).norm() < 4e-3 * exact.norm()


class Seen(TorchDispatchMode):
    """Entered first, it sees ops as they are computed: dtypes of tensors, by op."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = {a.dtype for a in args if isinstance(a, Tensor)}
        self.dtypes.setdefault(func.__name__, set()).update(found)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_slow_is_computed_in_float32_and_nothing_else(dtype: torch.dtype) -> None:
    a, b = draw(1, 3, 5, 20, dtype=dtype), draw(2, 3, 20, 4, dtype=dtype)
    q = draw(3, 1, 2, 9, 16, dtype=dtype).requires_grad_()
    with Seen() as seen, half_products():
        for product in (
            a @ b, a[0] @ b[0], torch.addmm(a[0, :, :4], a[0], b[0]),
            torch.baddbmm(a[:, :, :4], a, b), a + 1,
        ):  # fmt: skip
            assert product.dtype == dtype
        out = functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        torch.autograd.grad(out, q, torch.ones_like(out))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for name in ("bmm", "mm", "addmm", "baddbmm", f"{attention}_backward"):
        assert seen.dtypes[f"{name}.default"] == {torch.float32}, name
    assert dtype in seen.dtypes["add.Tensor"] and dtype in seen.dtypes[f"{attention}.default"]


def test_other_dtypes_devices_and_ops_pass_through() -> None:
    x = draw(1, 4, 8, dtype=torch.float32)
    half = x.bfloat16()
    with half_products():
        assert torch.equal(x @ x.T, x.matmul(x.T))
        assert (half.to("meta") @ half.to("meta").T).device.type == "meta"
        assert torch.equal(half + half, 2 * half)
        with pytest.raises(RuntimeError, match="dtype"):
            _ = x @ half.T
    assert torch.equal(x @ x.T, x.matmul(x.T))


def test_nothing_stands_in_the_way_where_the_cpu_has_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_slow_dtypes", frozenset)
    with half_products():
        assert torch._C._len_torch_dispatch_stack() == 0


def test_a_model_on_another_device_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    for where, count in (("cpu", 1), ("meta", 0)):
        with half_products(model.to(where)):
            assert torch._C._len_torch_dispatch_stack() == count


def test_passes_and_evaluation_run_within_it() -> None:
    depths: list[int] = []

    class Look(Pass):
        name = "look"

        def run(self, program: Program) -> Program:
            depths.append(torch._C._len_torch_dispatch_stack())
            return program

    model = models.tiny_llama(layers=1)
    run_pipeline(capture(model), [Look()])
    model.register_forward_hook(lambda *_: depths.append(torch._C._len_torch_dispatch_stack()))
    evaluate(model, torch.arange(16).view(2, 8))
    assert depths == [1, 1]
