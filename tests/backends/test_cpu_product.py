"""The emitted product kernels against float64 products: every tier that this CPU can run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.backends.cpu import linear, pieces, product, tiers, toolchain
from lowra.backends.cpu.activations import activations_for
from lowra.backends.cpu.emit import KernelKey, emit, key_of
from lowra.backends.cpu.tiers import TIERS, Tier, best_tier, runnable, usable_flags
from lowra.compiler import trellis
from lowra.compiler.ops import DIRECT
from lowra.compiler.packing import FORMATS, levels_of, width_of
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import PackedWeight, pack_weight, scale_groups
from lowra.runtime.modules import QuantizedLinear

pytestmark = pytest.mark.skipif(toolchain.find_compiler() is None, reason="no C++ compiler")
RUNNABLE = runnable(usable_flags())
EVERY_KERNEL = [(tier, name) for tier in RUNNABLE for name in tier.activations]
NAMES = [f"{tier.name} {name}" for tier, name in EVERY_KERNEL]
# Error as a share of |x| |w|, before y is rounded to the type of x. bfloat16: x and tables are
# rounded to 8 bits. int16: 15 bits of the largest activation, tables in up to 255 steps. int8: 7.
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3, "int16": 4.1e-3, "int8": 1.2e-2}
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


MIXTURES = [(2,), (1, 2, 3, 4, 8, 9), (12,), (4, 8, 9, 11, 12, 13)]


@dataclass(frozen=True)
class Shape:
    n: int
    k: int
    widths: tuple[int, ...]
    group: int = -1
    shared: bool = True
    block: int = 1
    seed: int = 0


def drawn_codes(widths: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """[n, k] for rows of `widths` (ids), those of trellis panels on their paths."""
    levels = torch.tensor([levels_of(int(id)) for id in widths])
    codes = torch.randint(256, (len(widths), k), generator=generator) % levels.view(-1, 1)
    for id, format_ in FORMATS.items():
        if format_.trellis:
            rows = (widths == id).nonzero().squeeze(1)
            codes[rows] = trellis.codes_of(codes[rows] % (format_.levels // 2))
    return codes


def packed_of(shape: Shape) -> PackedWeight:
    generator = torch.Generator().manual_seed(shape.seed)
    n, k = shape.n, shape.k
    chosen = torch.randint(len(shape.widths), (n,), generator=generator)
    widths = torch.tensor(shape.widths)[chosen]
    codes = drawn_codes(widths, k, generator)
    tables = torch.randn(n, 264, generator=generator)
    scales = None
    if shape.group:
        scales = torch.rand(n, scale_groups(k, shape.group), generator=generator) + 0.1
    books: Any = {width_of(b): tables[0, b : b + levels_of(b)] for b in shape.widths}
    rotation = Rotation(shape.seed, shape.block)
    return pack_weight(
        codes, widths, books if shape.shared else tables, scales, shape.group, rotation
    )


def worst(y: Tensor, x: Tensor, packed: PackedWeight, want: Tensor) -> float:
    """The largest error as a share of |x| |w|, above that of rounding y.

    |w| is that of a row with nothing but its largest level: a table is as exact as that one asks.
    """
    levels, scales = float(packed.codebooks.abs().max()), packed.scales
    largest = levels * (1.0 if scales is None else float(scales.abs().max()))
    room = x.double().norm(dim=-1, keepdim=True) * largest * packed.k**0.5 + 1e-30
    error = (y.double() - want).abs() - ROUNDING[x.dtype] * want.abs()
    return float((error / room).max()) if y.numel() else 0.0


def launched(x: Tensor, packed: PackedWeight, name: str, tier: Tier, *rest: Any) -> Tensor:
    ready = product.prepared(packed.op_args(), name, tier)
    assert ready is not None
    return product.product(x, ready, *(rest or (None,)))


def check(shape: Shape, m: int, rank: int, dtype: torch.dtype, tier: Tier, name: str) -> None:
    packed, generator = packed_of(shape), torch.Generator().manual_seed(shape.seed)
    dense = packed.dequantize(torch.float64)
    x = torch.randn(m, shape.k, generator=generator).to(dtype)
    assert worst(launched(x, packed, name, tier), x, packed, x.double() @ dense.T) < TOLERANCE[name]
    a = (torch.randn(rank, shape.k, generator=generator) / shape.k**0.5).to(dtype)
    b, bias = torch.randn(shape.n, rank, generator=generator).to(dtype), torch.randn(shape.n)
    y = launched(x, packed, name, tier, bias.to(dtype), (a, b, 0.5))
    want = x.double() @ dense.T + bias.to(dtype).double()
    want += 0.5 * (x.double() @ a.double().T) @ b.double().T
    assert worst(y, x, packed, want) < TOLERANCE[name] + 1e-6 * rank


@pytest.mark.parametrize(("tier", "name"), EVERY_KERNEL, ids=NAMES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_products_equal_float64(tier: Tier, name: str, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 800))
    shape = Shape(
        data.draw(st.integers(1, 45)), k, data.draw(st.sampled_from(MIXTURES)),
        data.draw(st.sampled_from([-1, 0, 40])), data.draw(st.booleans()),
        data.draw(st.sampled_from([1, k & -k])), data.draw(st.integers(0, 999)),
    )  # fmt: skip
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    m = data.draw(st.sampled_from([1, 1, 2, 3, 4, 5, 9, 18, 37]))
    check(shape, m, data.draw(st.integers(1, 20)), dtype, tier, name)


@pytest.mark.parametrize("width", [1, 3, 4, 8, 9, 11, 12, 13])
def test_rows_of_one_width(width: int) -> None:
    for k in (7, 32, 96, 224, 256, 320, 576, 650, 1000, 1290):
        name = activations_for(torch.bfloat16, k)
        for m in (1, 3, 12):
            check(Shape(33, k, (width,), seed=k), m, 16, torch.bfloat16, best_tier(), name)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("tier", "name"), EVERY_KERNEL, ids=NAMES)
def test_trellis_panels_of_several_runs(tier: Tier, name: str, shared: bool) -> None:
    for k in (40, 600):
        shape = Shape(420, k, (11, 12, 13, 9), shared=shared, seed=k)
        for m in (1, 2, 21):
            check(shape, m, 3, torch.bfloat16, tier, name)


def test_trellis_beside_plain_rows_is_right_if_slow() -> None:
    """No pass makes such a weight, but a file may hold one."""
    packed = packed_of(Shape(70, 300, (1, 3, 12), shared=False))
    x = torch.randn(3, 300)
    y = launched(x, packed, "int16" if best_tier().vectors else "float32", best_tier())
    assert worst(y, x, packed, x.double() @ packed.dequantize(torch.float64).T) < 4.1e-3


@pytest.mark.skipif(not best_tier().tiles, reason="no AMX")
@pytest.mark.parametrize("name", ["int8", "int16"])
def test_tiles_give_what_lanes_give(name: str) -> None:
    """Bit for bit, and beside torch's own products, which set up tiles of their own."""
    amx, lanes = RUNNABLE[:2]
    for k in (30, 64, 600, 1100):
        packed = packed_of(Shape(83, k, (1, 2, 3, 4, 9) if k % 4 else (4, 9, 12, 13), seed=k))
        x = torch.randn(100, k, generator=torch.Generator().manual_seed(k)).bfloat16()
        dense = packed.dequantize(torch.bfloat16)
        torch_first = x @ dense.T
        y = launched(x, packed, name, amx)
        assert torch.equal(y, launched(x, packed, name, lanes))
        assert torch.equal(torch_first, x @ dense.T)


@pytest.mark.parametrize("m", [3, 23])
@pytest.mark.parametrize(("tier", "name"), EVERY_KERNEL, ids=NAMES)
def test_the_number_of_threads_changes_no_bit(tier: Tier, name: str, m: int) -> None:
    packed = packed_of(Shape(700, 600, MIXTURES[1 if m == 3 else 3], block=8))
    x, before = torch.randn(m, 600), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(launched(x, packed, name, tier))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("widths", [(2,), (1, 2, 3, 4, 9), (4, 8), (4, 12, 13)])
def test_hundreds_of_tokens_with_long_rows(widths: tuple[int, ...]) -> None:
    """More than are prepared at a time; rows of one width are neighbours in y, others are not."""
    packed = packed_of(Shape(71, linear.SHORT_ROW + 60, widths, block=4))
    ready = product.prepared(packed.op_args(), "int16")
    assert ready is None or ready.looked_up == (8 not in widths)
    x = torch.randn(300, packed.k).bfloat16()
    a, b = torch.randn(5, packed.k).bfloat16() / 40, torch.randn(71, 5).bfloat16()
    bias = torch.randn(71).bfloat16()
    y = torch.ops.lowra.quantized_linear_lora(x, *packed.op_args(), bias, a, b, 0.5)
    want = x.double() @ (packed.dequantize(torch.float64) + 0.5 * b.double() @ a.double()).T
    assert worst(y, x, packed, want + bias.double()) < TOLERANCE["int16"] + 4e-3


@pytest.mark.parametrize("m", [3, 90])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("block", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_and_infinity_give_what_the_reference_gives(
    bad: float, block: int, dtype: torch.dtype, m: int
) -> None:
    widths = (1, 2, 3, 4, 8, 9) if m == 3 else (1, 2, 3, 4, 9)
    packed = packed_of(Shape(20, 320, widths, block=block))
    x = torch.randn(m, 320).to(dtype)
    x[1, 70] = bad
    got = torch.ops.lowra.quantized_linear(x, *packed.op_args(), None)
    want = linear.linear.kernels(linear.linear.stored_rows)["quantized_linear"](
        x, *packed.op_args(), None
    )
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[1].isinf(), want[1].isinf())
    assert torch.equal(got[1].sign()[~got[1].isnan()], want[1].sign()[~want[1].isnan()])
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=0.02, atol=0.3)


@pytest.mark.parametrize("size", [0.0, 1e-35, 3e-20, 1e20, 1e36])
def test_activations_of_any_size(size: float) -> None:
    packed = packed_of(Shape(20, 64, (2,)))
    dense = packed.dequantize(torch.float64)
    x = (torch.rand(2, 64) * size).to(torch.bfloat16)
    y = torch.ops.lowra.quantized_linear(x, *packed.op_args(), None)
    want = (x.double() @ dense.T).float().to(torch.bfloat16)
    finite = want.isfinite()
    assert worst(
        torch.where(finite, y, 0.0), x, packed, torch.where(finite, want, 0.0).double()
    ) < 5e-3  # fmt: skip


LAYOUTS: dict[str, Any] = {
    "no tokens": lambda k: torch.randn(0, k),
    "transposed": lambda k: torch.randn(k, 5).T,
    "every other token": lambda k: torch.randn(6, k)[::2],
    "misaligned": lambda k: torch.randn(4 * k + 3)[3:].view(4, k),
    "part of a wider row": lambda k: torch.randn(4, 2 * k)[:, 3 : 3 + k],
    "one token repeated": lambda k: torch.randn(1, k).expand(4, k),
    "one axis": lambda k: torch.randn(k),
    "three axes": lambda k: torch.randn(2, 3, k)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_every_layout(layout: str) -> None:
    packed = packed_of(Shape(21, 96, (2,), block=32))
    x = LAYOUTS[layout](96).bfloat16()
    y = torch.ops.lowra.quantized_linear(x, *packed.op_args(), None)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], 21) and y.is_contiguous()
    dense = packed.dequantize(torch.float64)
    assert worst(y, x, packed, x.double() @ dense.T) < 2e-3


def test_codebooks_that_training_changes_are_read_anew() -> None:
    packed = packed_of(Shape(20, 96, (2, 4)))
    x = torch.randn(2, 96).bfloat16()
    torch.ops.lowra.quantized_linear(x, *packed.op_args(), None)
    packed.codebooks.data.mul_(-2.0)  # in a way that autograd does not see
    y = torch.ops.lowra.quantized_linear(x, *packed.op_args(), None)
    dense = packed.dequantize(torch.float64)
    assert worst(y, x, packed, x.double() @ dense.T) < 2e-3


def test_a_weight_is_prepared_once_and_forgotten_with_its_codes() -> None:
    packed = packed_of(Shape(20, 96, (2,)))
    x = torch.randn(1, 96).bfloat16()
    before = len(product._prepared)
    first = torch.ops.lowra.quantized_linear(x, *packed.op_args(), None)
    assert len(product._prepared) == before + 1
    assert torch.equal(first, torch.ops.lowra.quantized_linear(x, *packed.op_args(), None))
    assert len(product._prepared) == before + 1
    del packed
    assert len(product._prepared) == before


def test_every_value_of_a_codebook_is_near_its_integer() -> None:
    """One column, so that y shows one value: 4 levels lie within 1/1000 of their span."""
    for seed in range(20):
        packed = packed_of(Shape(4, 1, (2,), group=0, seed=seed))
        dense = packed.dequantize(torch.float64)
        span = float(packed.codebooks.max() - packed.codebooks.min())
        y = launched(torch.ones(1, 1), packed, activations_for(torch.bfloat16, 1), best_tier())
        assert float((y[0].double() - dense[:, 0]).abs().max()) < 2e-3 * span


@pytest.mark.parametrize("granted", [True, False])
def test_tiles_that_the_system_refuses_are_not_used(
    granted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    class System:
        def syscall(self, *words: int) -> int:
            asked.append(words)
            return 0 if granted else -1

    monkeypatch.setattr(tiers, "cpu_flags", lambda: TIERS[0].needs)
    monkeypatch.setattr(tiers.ctypes, "CDLL", lambda _: System())
    found = runnable(tiers.usable_flags.__wrapped__())
    assert found[0].tiles == granted and found[1 if granted else 0].name == "avx512-bf16"
    assert asked == [(158, 0x1023, 18)]


@pytest.mark.parametrize("tier", TIERS, ids=lambda tier: tier.name)
def test_emitting_is_pure(tier: Tier) -> None:
    for name in tier.activations:
        key = key_of(tier, name, {1, 12, 8}, group_scales=False)
        assert emit(key) == emit(KernelKey(tier, key.activations, key.widths))


def test_a_tier_runs_only_where_the_cpu_reports_all_it_needs() -> None:
    assert [tier.name for tier in runnable(frozenset())] == ["plain"]
    for tier in TIERS:
        assert tier in runnable(tier.needs)
        for flag in tier.needs:
            assert tier not in runnable(tier.needs - {flag})


def test_x86_compilers_can_build_every_tier(tmp_path: Any) -> None:
    """Also those that this CPU cannot run."""
    if not toolchain.cpu_flags():
        pytest.skip("not an x86 CPU")
    compiler = toolchain.find_compiler()
    assert compiler is not None
    for tier in TIERS:
        if tier not in RUNNABLE:
            source = emit(KernelKey(tier, tier.activations[-1], (2, 11, 13)))
            toolchain.build(source, compiler, tmp_path / f"{tier.name}.so", tier.options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [-1, 40])
@pytest.mark.parametrize("widths", [(1, 2, 3, 4, 9), (4, 9, 11, 12, 13)])
def test_many_tokens_go_by_pieces(
    dtype: torch.dtype, group: int, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, with pieces so small that there are several."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 17)
    packed = packed_of(Shape(300, 576, widths, group, block=64))
    dense = packed.dequantize(torch.float64)
    assert len(pieces.pieces(300, 576, 64, dtype)) > 1
    x = torch.randn(2, 70, 576).to(dtype).requires_grad_()
    bias = torch.randn(300).to(dtype)
    a, b = torch.randn(4, 576).to(dtype) / 24, torch.randn(300, 4).to(dtype)
    y = torch.ops.lowra.quantized_linear_lora(x, *packed.op_args(), bias, a, b, 0.5)
    want = x.detach().double() @ (dense + 0.5 * b.double() @ a.double()).T + bias.double()
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert float((y.detach().double() - want).norm() / want.norm()) < limit
    grad = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, grad)
    want = grad.double() @ (dense + 0.5 * b.double() @ a.double())
    assert float((got.double() - want).norm() / want.norm()) < limit


def test_modules_without_gradients_skip_the_dispatcher_and_give_the_same() -> None:
    packed = packed_of(Shape(40, 96, (2,), block=32))
    factors = (torch.randn(4, 96), torch.randn(40, 4), 0.5)
    layer = QuantizedLinear(packed, None, torch.bfloat16, factors)
    x, seen = torch.randn(2, 96).bfloat16(), []
    original = DIRECT["cpu"]
    DIRECT["cpu"] = lambda *given: (seen.append(len(given)), original(*given))[1]
    try:
        with_gradients = layer(x)
        assert not seen and with_gradients.requires_grad
        with torch.no_grad():
            assert torch.equal(layer(x), with_gradients) and seen == [4]
            with torch.profiler.profile() as profile:
                layer(x)
    finally:
        DIRECT["cpu"] = original
    assert seen == [4]
    assert any("quantized_linear_lora" in event.key for event in profile.key_averages())


def test_an_input_changed_in_place_is_rotated_again() -> None:
    packed = packed_of(Shape(40, 96, (2,), block=32))
    dense, x = packed.dequantize(torch.float64), torch.randn(80, 96)
    for factor in (1.0, -2.0):
        x.mul_(factor)
        y = torch.ops.lowra.quantized_linear(x, *packed.op_args(), None)
        want = x.double() @ dense.T
        assert float((y.double() - want).norm() / want.norm()) < 1e-5


def test_a_mixture_has_one_kernel_and_trellis_mixtures_another() -> None:
    tier = TIERS[0]
    plain, other = (key_of(tier, "int8", ids, False).widths for ids in ({1, 4}, {4, 11}))
    assert plain == key_of(tier, "int8", {2, 3, 9}, False).widths and plain != other
    assert other == key_of(tier, "int8", {9, 12, 13}, False).widths
    assert key_of(tier, "int8", {13, 8}, False).widths == (13,)
