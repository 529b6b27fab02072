"""Gradients of codebooks and scales as a GPU computes them, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from lowra.backends.triton import service, table_gradients
from lowra.backends.triton.targets import INTERPRETER, TARGETS
from lowra.backends.triton.weight import weight_of
from tests.backends.test_cpu_product import Shape, packed_of
from tests.backends.test_table_gradients import close, drawn, exact

pytest.importorskip("triton", reason="Triton is not installed: pip install 'lowra[triton]'")

CASES = {
    "one width": Shape(40, 300, (2,)),
    "every width": Shape(50, 96, (1, 2, 3, 4, 8, 9), block=32),
    "trellis codes": Shape(150, 100, (11, 12, 13), 40),
    "trellis codes and own codebooks": Shape(70, 300, (4, 12), shared=False),
    "own codebooks": Shape(37, 100, (1, 3, 9), 40, shared=False),
    "no scales": Shape(20, 70, (2, 4), 0),
    "groups across pieces": Shape(6, 1400, (2,), 96),
    "a row": Shape(1, 33, (4,)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_gradients, "PIECE_BYTES", 1)  # many pieces
    weight = packed_of(CASES[name])
    grad, x = drawn(weight, 9, dtype)
    packed = tuple(weight.op_args())
    got = table_gradients.by_codes(grad, x, packed, weight_of(packed), INTERPRETER)
    for one, two in zip(got, exact(grad, x, weight), strict=True):
        assert one.dtype == torch.float32 and close(one, two, dtype)


def test_gradients_in_float16_are_summed_in_float32() -> None:
    """dL/dW of many tokens is larger than any float16."""
    weight = packed_of(CASES["one width"])
    grad, x = torch.full((300, 40), 40.0).half(), torch.full((300, 300), 40.0).half()
    packed = tuple(weight.op_args())
    got = table_gradients.by_codes(grad, x, packed, weight_of(packed), INTERPRETER)
    for one, two in zip(got, exact(grad, x, weight), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-5, atol=1)


def test_where_kernels_fail_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unsupported toolchain")

    monkeypatch.setattr(service, "failures", {})
    monkeypatch.setattr(table_gradients, "target_of", lambda device: TARGETS[1])
    monkeypatch.setattr(table_gradients.launch, "anew_where_broken", fail)
    weight = packed_of(CASES["own codebooks"])
    grad, x = drawn(weight, 9, torch.float32)
    for _ in range(2):
        got = table_gradients.table_gradients(grad, x, *weight.op_args())
        assert all(map(close, got, exact(grad, x, weight), [torch.float32] * 2))
    assert len(service.failures) == 1
