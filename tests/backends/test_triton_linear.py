"""GPU kernels in Triton's interpreter, against the reference and float64 products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.backends.reference import linear as reference
from lowra.backends.triton import build, launch, linear, schedule, service, workspace
from lowra.backends.triton.emit import emit
from lowra.backends.triton.keys import Blocks
from lowra.backends.triton.schedule import UNPACKED, Choice
from lowra.backends.triton.targets import INTERPRETER
from lowra.backends.triton.weight import weight_of
from lowra.compiler.rotation import Rotation, rotate, unrotate
from lowra.compiler.trellis import RUN
from tests.backends.test_cpu_product import Shape, packed_of

pytest.importorskip("triton", reason="Triton is not installed: pip install 'lowra[triton]'")

# bfloat16: rotated x, h and y are rounded, and the interpreter cuts where a GPU rounds.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
EVERY = (1, 2, 3, 4, 8, 9)
TRELLIS = [(11,), (12,), (13,), (13, 12, 11), (8, 4, 13, 12, 9)]


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / (want.norm() + 1e-30))


def check(shape: Shape, m: int, rank: int, dtype: torch.dtype) -> None:
    packed = packed_of(shape)
    dense = packed.dequantize(torch.float64)
    x, bias = torch.randn(m, shape.k).to(dtype), torch.randn(shape.n).to(dtype)
    want = x.double() @ dense.T + bias.double()
    factors = None
    if rank:
        a, b = torch.randn(rank, shape.k).to(dtype) / 8, torch.randn(shape.n, rank).to(dtype)
        factors = (a, b, 0.5)
        want += 0.5 * (x.double() @ a.double().T) @ b.double().T
    y = linear.forward(x, packed.op_args(), bias, factors, INTERPRETER)
    assert y.dtype == dtype and distance(y, want) < LIMIT[dtype]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_products_equal_float64(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 700))
    shape = Shape(
        data.draw(st.integers(1, 150)), k,
        data.draw(st.sampled_from([*[(b,) for b in EVERY], (1, 2), (2, 4, 9), (3, 8), EVERY])),
        data.draw(st.sampled_from([-1, -1, 0, 32, 40, 64, 128, 256])), data.draw(st.booleans()),
        data.draw(st.sampled_from([1, k & -k])), data.draw(st.integers(0, 999)),
    )  # fmt: skip
    m = data.draw(st.sampled_from([1, 2, 7, 16, 17, 40, 70]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    check(shape, m, data.draw(st.sampled_from([0, 1, 16, 20])), dtype)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 16, 33, 64, 65, 128, 257, 300])
def test_any_number_of_tokens(m: int) -> None:
    check(Shape(140, 600, (2, 3, 9)), m, 8, torch.float32)


@pytest.mark.parametrize("m", [3, 33, 128])
@pytest.mark.parametrize("widths", [(1,), (4, 1), (8, 2)], ids=str)
def test_any_number_of_tokens_of_other_widths(widths: tuple[int, ...], m: int) -> None:
    check(Shape(70, 320, widths), m, 0, torch.float32)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_products_of_trellis_codes_equal_float64(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 330))
    shape = Shape(
        data.draw(st.integers(1, 150)), k, data.draw(st.sampled_from(TRELLIS)),
        data.draw(st.sampled_from([-1, 0, 40, 64])), data.draw(st.booleans()),
        data.draw(st.sampled_from([1, k & -k])), data.draw(st.integers(0, 999)),
    )  # fmt: skip
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    check(shape, data.draw(st.sampled_from([1, 16, 40, 70])), 0, dtype)


@pytest.mark.parametrize(("rows", "warps"), [(32, 2), (64, 4), (128, 4)])
def test_tiles_of_trellis_rows_begin_anywhere_in_a_run(rows: int, warps: int) -> None:
    """Runs that a tile shares with the one before, and tiles of two runs."""
    packed, x = packed_of(Shape(300, 300, (13, 12))), torch.randn(2, 300)
    weight = weight_of(packed.op_args())
    choice = Choice(Blocks(rows, 16, warps, 1))
    y = launch.product(x, weight, INTERPRETER, None, choice=choice)
    assert all(count > 2 * RUN for count in weight.panels[1::2])
    assert distance(y, x.double() @ packed.dequantize(torch.float64).T) < 2e-6


def test_an_overridden_kernel_is_built_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its epilogue gives twice the product."""
    packed = packed_of(Shape(21, 96, (2,)))
    x, dense = torch.randn(2, 96), packed.dequantize(torch.float64)
    linear.forward(x, packed.op_args(), None, None, INTERPRETER)
    plans = weight_of(packed.op_args()).form.plans.values()
    (launcher,) = (plan[0] for plan in plans if isinstance(plan, tuple))
    text = emit(launcher.key).replace("acc.to(y.dtype", "(2 * acc).to(y.dtype")
    (tmp_path / f"{launcher.name}.py").write_text(text)
    monkeypatch.setenv(build.OVERRIDE, str(tmp_path))
    other = packed_of(Shape(21, 96, (2,)))
    for cache in (launch.launcher_of, build.kernel_of):
        cache.cache_clear()
    y = linear.forward(x, other.op_args(), None, None, INTERPRETER)
    for cache in (launch.launcher_of, build.kernel_of):
        cache.cache_clear()
    assert distance(y, 2 * x.double() @ dense.T) < 2e-6


@pytest.mark.parametrize("width", EVERY)
@pytest.mark.parametrize("group", [-1, 64, 128])
def test_rows_of_one_width(width: int, group: int) -> None:
    check(Shape(70, 1344, (width,), group, shared=group < 0), 3, 0, torch.float32)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize("rank", [0, 8])
def test_many_tokens_by_way_of_an_unpacked_weight(
    rank: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def always(_: object, m: int, *given: object) -> Choice:
        asked.append(m)
        return UNPACKED

    monkeypatch.setattr(linear, "choice_for", always)
    monkeypatch.setattr(launch, "product", None)  # not asked
    check(Shape(140, 576, (2, 4, 9), block=block), 20, rank, dtype)
    assert asked == [20]


@pytest.mark.parametrize("m", [1, 20])
def test_factors_of_another_dtype_are_read_as_they_are(
    m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As trained ones are beside a model in bfloat16: B in float32 meets the kernel of few tokens
    uncast."""
    given: list[torch.dtype] = []
    run = launch.run

    def noted(launcher: launch.Launcher, grid: Any, tensors: dict[str, Any]) -> None:
        if "lora_b" in tensors:
            given.append(tensors["lora_b"].dtype)
        run(launcher, grid, tensors)

    monkeypatch.setattr(launch, "run", noted)
    packed = packed_of(Shape(40, 96, (2,)))
    x, a, b = torch.randn(m, 96).half(), torch.randn(8, 96) / 8, torch.randn(40, 8)
    y = linear.forward(x, packed.op_args(), None, (a, b, 0.5), INTERPRETER)
    want = x.double() @ (packed.dequantize(torch.float64) + 0.5 * b.double() @ a.double()).T
    assert distance(y, want) < 2e-3 and given == [torch.float32 if m == 1 else torch.float16]


@pytest.mark.parametrize("m", [3, 40])
def test_factors_of_a_large_rank_are_added_by_torch(m: int) -> None:
    rank = schedule.MOST_FUSED_RANK + 1
    check(Shape(140, 600, (2, 9), block=8), m, rank, torch.float32)


def test_parts_of_a_sum_are_added_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split among more programs than interpreted processors ask for; counters end at zero."""
    monkeypatch.setattr(schedule, "INTERPRETED_PROCESSORS", 64)
    for widths in [(2,), (4, 9, 1)]:
        check(Shape(90, 2400, widths), 5, 16, torch.float32)
    assert workspace._workspaces
    for _, counters in workspace._workspaces.values():
        assert not counters.any()


@pytest.mark.parametrize("group", [-1, 0, 32, 40])
@pytest.mark.parametrize("shared", [True, False])
def test_unpacked_values_are_those_of_the_reference_to_the_bit(group: int, shared: bool) -> None:
    for k, dtype in ((1380, torch.float32), (70, torch.float16)):
        packed = packed_of(Shape(50, k, EVERY, group, shared))
        got = linear.unpacked(packed.op_args(), dtype, INTERPRETER)
        want = reference.stored_rows(*packed.op_args()[:7], dtype)
        assert torch.equal(got, want)


@pytest.mark.parametrize("widths", TRELLIS)
@pytest.mark.parametrize("shared", [True, False])
def test_unpacked_trellis_values_are_those_of_the_reference_to_the_bit(
    shared: bool, widths: tuple[int, ...]
) -> None:
    for k, group, dtype in ((330, 40, torch.float32), (256, -1, torch.float16)):
        packed = packed_of(Shape(150, k, widths, group, shared))
        got = linear.unpacked(packed.op_args(), dtype, INTERPRETER)
        assert torch.equal(got, reference.stored_rows(*packed.op_args()[:7], dtype))


def test_pieces_of_columns_are_those_of_the_whole() -> None:
    packed = packed_of(Shape(40, 3000, EVERY))
    weight = weight_of(packed.op_args())
    whole = launch.values(weight, torch.float32, INTERPRETER)
    for columns in (slice(0, 1280), slice(1280, 2560), slice(2560, 3000), slice(1280, 3000)):
        part = launch.values(weight, torch.float32, INTERPRETER, columns)
        assert torch.equal(part, whole[:, columns])


@pytest.mark.parametrize("block", [1, 2, 64, 256, 1024])
def test_rotation_and_its_way_back(block: int) -> None:
    rotation, k = Rotation(5, block), 3 * block if block > 1 else 50
    x = torch.randn(3, k)
    turned = launch.rotated(x, rotation, INTERPRETER)
    assert distance(turned, rotate(x.double(), rotation)) < 1e-6
    back = launch.rotated(x, rotation, INTERPRETER, back=True)
    assert distance(back, unrotate(x.double(), rotation)) < 1e-6


@pytest.mark.parametrize("widths", [(1, 2, 9), (1, 3, 8), (12, 13)], ids=str)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_input_gradients_by_pieces(
    dtype: torch.dtype, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "PIECE_BYTES", 1)
    packed = packed_of(Shape(60, 1344, widths, block=64))
    grad = torch.randn(2, 3, 60).to(dtype)
    got = linear.backward(grad, packed.op_args(), INTERPRETER)
    assert got.dtype == dtype and got.shape == (2, 3, 1344)
    assert distance(got, grad.double() @ packed.dequantize(torch.float64)) < LIMIT[dtype]


def test_pieces_of_a_gradient_are_as_small_as_tiles_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB of 28672 rows in bfloat16 are 292 columns."""
    made: list[int] = []
    monkeypatch.setattr(launch, "rotated", lambda out, *_, **__: out)

    def values(weight: Any, dtype: torch.dtype, target: Any, columns: slice) -> torch.Tensor:
        made.append(columns.stop - columns.start)
        return torch.zeros(weight.n, made[-1], dtype=dtype)

    monkeypatch.setattr(launch, "values", values)
    monkeypatch.setattr(linear, "PIECE_BYTES", 2 * 60 * 292)
    for widths, longest in (((2, 1), 256), ((2, 9), 1280)):
        packed = packed_of(Shape(60, 1344, widths)).op_args()
        linear.backward(torch.zeros(2, 60).bfloat16(), packed, INTERPRETER)
        assert max(made) == longest and sum(made) == 1344
        made.clear()


def test_no_room_for_what_torch_multiplies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(linear, "choice_for", lambda *_: UNPACKED)
    monkeypatch.setattr(linear.functional, "linear", none)
    packed = packed_of(Shape(60, 96, (2,)))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        linear.forward(torch.zeros(3, 96), packed.op_args(), None, None, INTERPRETER)
    assert caught.value.__notes__ == [
        "lowra: no room for a product [3, 60] of torch.float32, 0 MiB"
    ]


LAYOUTS: dict[str, Any] = {
    "no tokens": lambda k: torch.randn(0, k),
    "transposed": lambda k: torch.randn(k, 5).T,
    "every other token": lambda k: torch.randn(6, k)[::2],
    "misaligned": lambda k: torch.randn(4 * k + 3)[3:].view(4, k),
    "one token repeated": lambda k: torch.randn(1, k).expand(4, k),
    "one axis": lambda k: torch.randn(k),
    "three axes": lambda k: torch.randn(2, 3, k)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_every_layout(layout: str) -> None:
    packed = packed_of(Shape(21, 96, (2,), block=32))
    x = LAYOUTS[layout](96)
    y = linear.forward(x, packed.op_args(), None, None, INTERPRETER)
    assert y.shape == (*x.shape[:-1], 21) and y.is_contiguous()
    assert distance(y, x.double() @ packed.dequantize(torch.float64).T) < 2e-6


def test_packed_tensors_of_another_layout_are_copied() -> None:
    packed = packed_of(Shape(21, 96, (2, 4)))
    codes, *rest = packed.op_args()
    assert isinstance(codes, torch.Tensor)
    spread = torch.zeros(2 * codes.numel(), dtype=torch.int32)[::2].copy_(codes)
    x = torch.randn(2, 96)
    y = linear.forward(x, (spread, *rest), None, None, INTERPRETER)
    assert torch.equal(y, linear.forward(x, packed.op_args(), None, None, INTERPRETER))


def test_a_row_number_out_of_range_is_not_written() -> None:
    packed = packed_of(Shape(21, 96, (2, 4)))
    arguments = list(packed.op_args())
    arguments[3] = packed.order.clone()
    arguments[3][[0, 5]] = torch.tensor([-7, 1 << 20], dtype=torch.int32)
    y = linear.forward(torch.ones(1, 96), tuple(arguments), None, None, INTERPRETER)
    want = linear.forward(torch.ones(1, 96), packed.op_args(), None, None, INTERPRETER)
    kept = [i for i in range(21) if i not in packed.order[[0, 5]].tolist()]
    assert torch.equal(y[:, kept], want[:, kept])


def test_a_wrong_size_is_refused() -> None:
    packed = list(packed_of(Shape(21, 96, (2, 4))).op_args())
    packed[0] = packed[0][:-1]  # type: ignore[index]
    with pytest.raises(ValueError, match="code words"):
        linear.forward(torch.ones(1, 96), tuple(packed), None, None, INTERPRETER)


def test_float64_is_declined_with_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    service.explain.cache_clear()
    packed = packed_of(Shape(21, 96, (2, 4)))
    x = torch.randn(2, 96, dtype=torch.float64)
    y = linear.forward(x, packed.op_args(), None, None, INTERPRETER)
    assert torch.equal(y, x @ packed.dequantize(torch.float64).T)
    linear.forward(x, packed.op_args(), None, None, INTERPRETER)
    assert len(caplog.records) == 1 and "torch.float64" in caplog.text
