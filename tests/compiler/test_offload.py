"""Heavy work sent to another device: what travels, what it gives, what is refused.

The device is a second name of the CPU here, so copies are none; what is sent is counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import lowra
from lowra.backends.reference import feedback, lloyd, moments, optimum
from lowra.compiler import offload as module
from lowra.compiler.errors import RecipeError
from lowra.compiler.offload import Offload, work_device
from tests import models
from tests.runtime.compiled_models import SMALL

CPU = torch.device("cpu")
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
ATTENTION = {op.name() for op in module._ATTENTION}


class Watched(Offload):
    """What it sends, by op."""

    def __init__(self, kept: list[Tensor] | None = None, room: int = 1 << 40) -> None:
        super().__init__(CPU, kept or [], room)
        self.ops: list[str] = []
        self.sent: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.sent)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.sent) > before:
            self.ops.append(func.name())
        return result

    def _sent(self, tensor: Tensor) -> Tensor:
        self.sent.append(tuple(tensor.shape))
        return super()._sent(tensor)


def test_products_travel_where_they_are_worth_it() -> None:
    large, small = torch.ones(512, 512), torch.ones(64, 64)
    with Watched() as mode:
        for matrix in (small, large):
            functional.linear(matrix, matrix)
            torch.addmm(matrix, matrix, matrix)
            torch.bmm(matrix[None], matrix[None])
        large @ large[0]
        large * large
    assert sorted(mode.ops) == ["aten::addmm", "aten::bmm", "aten::mm"]


def test_a_product_of_few_tokens_travels_only_with_a_weight_that_stays() -> None:
    x, weight = torch.ones(64, 2048), torch.ones(2048, 2048)
    for kept, ops in (([], []), ([weight], ["aten::mm"])):
        with Watched(kept) as mode:
            functional.linear(x, weight)
        assert mode.ops == ops


def test_a_weight_without_room_there_does_not_make_a_product_worth_the_way() -> None:
    x, weight = torch.ones(64, 2048), torch.ones(2048, 2048)
    for room, ops in ((weight.nbytes - 1, []), (weight.nbytes, ["aten::mm"] * 2)):
        with Watched([weight], room) as mode:
            for _ in range(2):  # there already, without room for another
                functional.linear(x, weight)
        assert mode.ops == ops


def test_kept_tensors_travel_once_and_their_views_are_found_in_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(768, 512, generator=generator) for _ in "ab")
    part = torch.ones(4)[:2]  # does not fill its storage
    mode = Watched([weight, part], room=weight.numel() * 4)
    with mode:
        first = x @ weight.T
        second = weight[256:].T @ weight[256:]
    assert list(mode._moved) == [weight.untyped_storage().data_ptr()] and mode.room == 0
    torch.testing.assert_close(first, x @ weight.T)
    torch.testing.assert_close(second, weight[256:].T @ weight[256:])
    with Watched([weight], room=8) as without_room:
        assert torch.equal(x @ weight.T, first)
    assert not without_room._moved


def test_gradients_travel_too() -> None:
    x, weight = torch.ones(512, 512), torch.randn(512, 512, requires_grad=True)
    with Watched() as mode:
        functional.linear(x, weight).square().sum().backward()
    assert mode.ops == ["aten::mm", "aten::mm"] and weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * (x @ weight.detach().T).T @ x)


def test_integers_stay_and_products_are_of_float32_whatever_is_set() -> None:
    whole, real = torch.ones(512, 512, dtype=torch.int64), torch.ones(512, 512)
    seen: list[str] = []

    class Look(Watched):
        def _sent(self, tensor: Tensor) -> Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return super()._sent(tensor)

    torch.set_float32_matmul_precision("high")
    try:
        with Look() as mode:
            whole @ whole
            real @ real
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert mode.ops == ["aten::mm"] and {*seen} == {"highest"}


@pytest.mark.usefixtures("everything_travels")
@pytest.mark.parametrize("heads", [4, 2])
def test_what_follows_attention_may_take_a_view_of_it(heads: int) -> None:
    """Its layout is that of the op; fewer heads of keys are shared."""
    q = torch.randn(2, 5, 4, 8).transpose(1, 2)
    k = torch.randn(2, 5, heads, 8).transpose(1, 2)
    given: dict[str, Any] = {"is_causal": True, "enable_gqa": heads < 4}
    want = functional.scaled_dot_product_attention(q, k, k, **given)
    with Watched() as mode:
        got = functional.scaled_dot_product_attention(q, k, k, **given)
    torch.testing.assert_close(got.transpose(1, 2).view(2, 5, 32), want.transpose(1, 2).flatten(2))
    assert ATTENTION & {*mode.ops}


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError("no room"), RuntimeError(CUBLAS)])
def test_what_the_device_has_no_memory_for_is_computed_here(
    raised: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Watched):
        def _sent(self, tensor: Tensor) -> Tensor:
            raise raised

    x = torch.ones(512, 512)
    with Full(), caplog.at_level("WARNING", logger="lowra"):
        found = [x @ x for _ in "ab"]
    assert torch.equal(found[0], x @ x) and len(caplog.records) == 1

    class Broken(Watched):
        def _sent(self, tensor: Tensor) -> Tensor:
            raise RuntimeError("an illegal memory access")

    with Broken(), pytest.raises(RuntimeError, match="illegal"):
        x @ x


@pytest.mark.usefixtures("everything_travels")
def test_a_compile_sends_its_heavy_work(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Watched()
    monkeypatch.setattr("lowra.api.work_device", lambda device: CPU if device else None)
    monkeypatch.setattr("lowra.api.offload", lambda device, kept: mode)
    got: Any = lowra.compile(models.tiny_llama(layers=1), bit_budget=3, device="cuda", **SMALL)
    fitted = {"moments", "lloyd_shared", "feedback_codes", "descend_codes"}
    assert {f"lowra::{name}" for name in fitted} <= {*mode.ops}
    solved = {"aten::mm", "aten::linalg_cholesky_ex", "aten::linalg_solve_triangular"}
    assert solved <= {*mode.ops} and {*mode.ops} >= ATTENTION
    want: Any = lowra.compile(models.tiny_llama(layers=1), bit_budget=3, **SMALL)
    losses = [sum(s["expected_loss"] for s in m.lowra.report["sites"]) for m in (got, want)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.usefixtures("everything_travels")
def test_runs_of_trellis_codes_stay() -> None:
    """No GPU kernel finds their paths."""
    weight, codes = torch.randn(6, 8), torch.zeros(6, 8, dtype=torch.uint8)
    tables = (torch.randn(6, 8).sort(1)[0], None, torch.zeros(8, dtype=torch.int64))
    for runs in (None, torch.zeros(6, dtype=torch.int64)):
        with Watched() as mode:
            torch.ops.lowra.feedback_codes(weight, torch.eye(8), *tables, runs)
            torch.ops.lowra.descend_codes(weight, torch.eye(8), *tables, codes, None, 1, runs)
        assert ("lowra::feedback_codes" in mode.ops) == (runs is None)
        assert ("lowra::descend_codes" in mode.ops) == (runs is None)


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU refuses: tensors of two devices in one op, unless one is a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = module._tensors(args, kwargs)
        assert len({tensor.device for tensor in found if tensor.dim()}) <= 1, func.name()
        return func(*args, **(kwargs or {}))


def test_the_reference_of_fitting_ops_stays_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without values, so that every branch on one is taken."""
    monkeypatch.setattr(Tensor, "__bool__", lambda self: True)
    monkeypatch.setattr(Tensor, "__float__", lambda self: 0.0)
    monkeypatch.setattr(Tensor, "tolist", lambda self: [0] * self.numel())
    monkeypatch.setattr(torch, "equal", lambda a, b: a.device != b.device)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    w, wide, square = empty(6, 70), empty(6, 300), empty(70, 70)
    starts, shared = [empty(6, 4, dtype=torch.float64)], [empty(4, dtype=torch.float64)]
    columns, codes = empty(70, dtype=torch.int64), empty(6, 70, dtype=torch.uint8)
    with OneDevice():
        found = [
            moments.moments(w, None), moments.moments(w, w),
            *lloyd.lloyd_rows(w, w, starts, 2, 0.1), *lloyd.lloyd_shared(w, w, shared, 2, 0.1),
            *lloyd.lloyd_scales(w, w, shared, 2, 0.1), *optimum.optimal_levels(w, w, [2, 4]),
            *optimum.optimal_levels(wide, wide[:1], [2, 4]),
        ]  # fmt: skip
        for scales in (None, empty(6, 1)):
            tables = (empty(6, 4), scales, columns)
            found.append(feedback.feedback_codes(w, square, *tables))
            found += feedback.descend_codes(w, square, *tables, codes, None, 1)
    assert {tensor.device.type for tensor in found} == {"meta"}


def test_devices_that_cannot_serve_are_refused() -> None:
    assert work_device(None) is None and work_device("cpu") is None
    for device, why in (
        ("gpu", "is unknown: use.*cuda:1"),
        ("meta", "cpu or cuda"),
        ("cuda:99", "GPUs"),
    ):
        with pytest.raises(RecipeError, match=why):
            work_device(device)
    with pytest.raises(RecipeError, match="device is read where a plan is measured"):
        lowra.plan(models.tiny_llama(layers=1), bit_budget=3, device="cuda")
