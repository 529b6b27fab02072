"""GPU kernels on a GPU: against float64, and against themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import pytest
import torch

import lowra
from lowra.backends.activations import activations
from lowra.backends.reference import feedback
from lowra.backends.reference.integers import integer_product
from lowra.backends.triton import integer, service, tuning
from lowra.backends.triton.weight import weight_of
from lowra.compiler.offload import offload
from lowra.compiler.rotation import rotate
from lowra.workflows.bench import random_weight
from lowra.workflows.tune_kernels import tune
from tests import models
from tests.backends.test_adapter_ops import batch, expected, held
from tests.backends.test_cpu_fitting import feedback_case, gram_of, rows_of, starts_of
from tests.backends.test_cpu_product import Shape, packed_of
from tests.backends.test_table_gradients import close, drawn, exact
from tests.compiler.deltas import FORMATS, Drawn, site_of
from tests.runtime.compiled_models import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There are kernels for the device, and none of them left its work to plain torch."""
    monkeypatch.setenv(service.SWITCH, "on")
    service.target_of.cache_clear()
    service.failures.clear()
    assert service.target_of(torch.device("cuda", torch.cuda.current_device())) is not None
    yield
    assert not service.failures
    service.target_of.cache_clear()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_product_on_a_device_is_the_same_every_time(kind: str) -> None:
    """Races would show as bits that change. Two inputs by turns: what one call leaves in memory
    that the next is given must not be right by chance."""
    packed = packed_of(Shape(1024, 8192, (1, 2, 12, 4, 9), block=4096))
    arguments_ = [a.cuda() if isinstance(a, torch.Tensor) else a for a in packed.op_args()]
    a, b = torch.randn(16, 8192).cuda().bfloat16() / 64, torch.randn(1024, 16).cuda().bfloat16()
    inputs = [torch.randn(3, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.lowra.quantized_linear_lora(x, *arguments_, None, a, b, 0.5)

    with activations(kind):
        first = [run(x) for x in inputs]
        for _ in range(500):
            for x, want in zip(inputs, first, strict=True):
                assert torch.equal(run(x), want)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("n", [1024, 4096])
def test_graphs_replayed_in_another_order_and_at_once_give_their_own_products(
    n: int, kind: str
) -> None:
    """Sums in the allocator's small room and in its large one. Both captured on one stream, with
    launches of that stream between; then side by side."""
    packed = packed_of(Shape(n, 8192, (1, 2, 9), block=4096))
    arguments_ = [a.cuda() if isinstance(a, torch.Tensor) else a for a in packed.op_args()]
    a, b = torch.randn(16, 8192).cuda().bfloat16() / 64, torch.randn(n, 16).cuda().bfloat16()
    inputs = [torch.randn(m, 8192, device="cuda", dtype=torch.bfloat16) for m in (1, 3)]
    stream, graphs, got = torch.cuda.Stream(), [], []

    def run(x: torch.Tensor) -> torch.Tensor:
        with activations(kind):
            return torch.ops.lowra.quantized_linear_lora(x, *arguments_, None, a, b, 0.5)

    want = [run(x) for x in inputs]
    for x in inputs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            got.append(run(x))
        graphs.append(graph)
    with torch.cuda.stream(stream):
        eager = run(inputs[0])
    torch.cuda.synchronize()
    assert torch.equal(eager, want[0])
    for graph, y, expected_ in zip(graphs[::-1], got[::-1], want[::-1], strict=True):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected_)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(200):
        for graph, side in zip(graphs, streams, strict=True):
            with torch.cuda.stream(side):
                graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


def test_a_product_under_reduce_overhead_leaves_nothing_in_the_memory_of_its_graphs() -> None:
    packed = packed_of(Shape(512, 4096, (2,)))
    arguments_ = [a.cuda() if isinstance(a, torch.Tensor) else a for a in packed.op_args()]

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.lowra.quantized_linear(x, *arguments_, None)

    fast, x = torch.compile(run, mode="reduce-overhead"), torch.randn(2, 4096, device="cuda")
    with torch.no_grad():
        for _ in range(4):
            got = fast(x).clone()
        assert torch.equal(got, run(x))


SHAPES = (
    Shape(300, 1344, (2,)), Shape(9000, 1344, (2,)), Shape(130, 576, (2, 9), 64, False),
    Shape(9000, 1344, (12,)), Shape(300, 480, (13, 11), 64, False),
    Shape(5000, 4096, (13, 12, 11), block=4096), Shape(5000, 4096, (1, 4, 9), block=4096),
    Shape(5000, 4096, (2, 3, 8), block=4096),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "limit", "tokens"),
    [
        (torch.bfloat16, 1e-2, (1, 5, 16, 40, 65, 128, 200, 256, 300, 520)),
        (torch.float16, 2e-3, (5, 40, 200)), (torch.float32, 1e-5, (1, 40, 300)),
    ],
)  # fmt: skip
def test_products_on_a_device_equal_float64(
    shape: Shape, dtype: torch.dtype, limit: float, tokens: tuple[int, ...]
) -> None:
    packed = packed_of(shape)
    there = [t.cuda() if isinstance(t, torch.Tensor) else t for t in packed.op_args()]
    a, b = torch.randn(16, shape.k).to(dtype) / 64, torch.randn(shape.n, 16).to(dtype)
    dense = packed.dequantize(torch.float64).cuda() + 0.5 * b.cuda().double() @ a.cuda().double()
    for m in tokens:
        x = torch.randn(m, shape.k).to(dtype).cuda()
        y = torch.ops.lowra.quantized_linear_lora(x, *there, None, a.cuda(), b.cuda(), 0.5)
        want = x.double() @ dense.T
        assert float((y.double() - want).norm() / want.norm()) < limit


@pytest.mark.parametrize(("kind", "m"), [("int8", 1), ("int8", 2), ("int16", 1), ("int16", 2)])
def test_products_in_integers_on_a_device_equal_float64_of_the_same_integers(
    kind: Literal["int8", "int16"], m: int
) -> None:
    """Through the op with an adapter, rotated; then without, to the integers themselves."""
    fine, limit = kind == "int16", 1e-2 if kind == "int16" else 3e-2
    for shape in (
        Shape(300, 1344, (2,)), Shape(5000, 4096, (1, 2, 3, 4, 9), block=4096),
        Shape(130, 8192, (2, 9), -1, False), Shape(9000, 1344, (1, 4)),
        Shape(290, 1344, (13, 11)), Shape(9000, 4096, (12,)), Shape(300, 1000, (1, 2, 3, 13)),
    ):  # fmt: skip
        packed = packed_of(shape)
        arguments_ = [a.cuda() if isinstance(a, torch.Tensor) else a for a in packed.op_args()]
        x = torch.randn(m, shape.k).bfloat16()
        a, b = torch.randn(16, shape.k) / 64, torch.randn(shape.n, 16)
        a, b = a.bfloat16(), b.bfloat16()
        with activations(kind):
            y = torch.ops.lowra.quantized_linear_lora(
                x.cuda(), *arguments_, None, a.cuda(), b.cuda(), 0.5
            )
        dense = packed.dequantize(torch.float64)
        want = x.double() @ (dense + 0.5 * b.double() @ a.double()).T
        assert float((y.cpu().double() - want).norm() / want.norm()) < limit
        target = service.target_of(y.device)
        assert target is not None
        turned = rotate(x.float(), packed.rotation).bfloat16()
        weight = weight_of((*arguments_,))
        given = (weight, m, x.dtype, fine, target, 0, "", False, y.device)
        got = integer.product(turned.cuda(), weight, integer.planned(*given), None)
        want = integer_product(x, packed.op_args(), fine)
        assert float((got.cpu().double() - want).norm() / want.norm()) < 4e-3


@pytest.mark.parametrize("widths", [(1, 2, 3, 4, 8, 9), (4, 11, 12, 13)], ids=str)
def test_values_and_gradients_on_a_device_equal_the_reference(widths: tuple[int, ...]) -> None:
    packed = packed_of(Shape(700, 1344, widths, 64, block=64))
    arguments_ = [a.cuda() if isinstance(a, torch.Tensor) else a for a in packed.op_args()]
    values = torch.ops.lowra.dequantize(*arguments_, torch.float32)
    torch.testing.assert_close(values.cpu(), packed.dequantize(), rtol=1e-5, atol=1e-6)
    grad = torch.randn(40, 700)
    got = torch.ops.lowra.input_gradient(grad.cuda(), *arguments_)
    torch.testing.assert_close(got.cpu(), grad @ packed.dequantize(), rtol=1e-3, atol=1e-3)


def test_adapters_on_a_device_equal_the_formula() -> None:
    """Every format and part, one adapter per token, then two; few tokens and many."""
    for parts in (frozenset[str](), frozenset({"core", "diagonal"}), frozenset({"out", "post"})):
        drawn = [
            Drawn(((17, format), (3, "f16")), ((20, format),), 128, parts, seed=i)
            for i, format in enumerate(FORMATS)
        ]
        made = [site_of("s", 1000, 1344, d) for d in drawn]
        meanings = [meaning for _, meaning in made]
        tables = held([site for site, _ in made], 4096)
        for dtype, limit in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
            for m, places in ((1, 1), (33, 1), (300, 2)):
                x, y = torch.randn(m, 1344).to(dtype), torch.randn(m, 1000).to(dtype)
                slots, weights = batch(m, len(made), places, m)
                arguments_ = [t.cuda() for t in (y, x, *tables, slots, weights)]
                got = torch.ops.lowra.apply_adapters(*arguments_, 20)
                again = torch.ops.lowra.apply_adapters(*arguments_, 20)
                want = expected(y, x, meanings, slots, weights)
                assert float((got.cpu().double() - want).norm() / want.norm()) < limit
                assert torch.equal(got, again)


@pytest.mark.usefixtures("own_home")
def test_what_tuning_finds_is_kept_and_gives_the_same_product() -> None:
    weight = random_weight(2048, 2048, 2, 1)
    found = list(tune([weight], (1, 100), torch.bfloat16))
    table = tuning.read_table(tuning.own_table(torch.cuda.get_device_name()))
    assert table == {line.case: line.choice for line in found} and len(table) == 2
    assert all(line.microseconds <= line.usual_microseconds for line in found)
    arguments_ = [a.cuda() if isinstance(a, torch.Tensor) else a for a in weight.op_args()]
    dense = weight.dequantize(torch.float64)
    for m in (1, 100):
        x = torch.randn(m, 2048).bfloat16()
        y = torch.ops.lowra.quantized_linear(x.cuda(), *arguments_, None)
        want = x.double() @ dense.T
        assert float((y.cpu().double() - want).norm() / want.norm()) < 1e-2


def test_a_model_on_a_device_is_compiled_and_used_there() -> None:
    model = models.tiny_llama(layers=2).cuda()
    small = lowra.compile(model, bit_budget=100, calibration_tokens=512, context=64)
    assert {p.device.type for p in (*small.parameters(), *small.buffers())} == {"cuda"}
    ids = torch.arange(12, device="cuda").view(2, 6)
    want = copy.deepcopy(small).cpu()(input_ids=ids.cpu()).logits
    got = small(input_ids=ids).logits
    assert float((got.cpu() - want).norm() / want.norm()) < 1e-3
    assert small.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 10)
    session = lowra.Session(small)
    assert float((session(input_ids=ids) - got).norm() / got.norm()) < 1e-3


def test_gradients_of_tables_on_a_device_equal_float64() -> None:
    for shape in (
        Shape(300, 1344, (1, 2, 3, 4, 8, 9)), Shape(130, 2600, (2, 9), 40, False),
        Shape(500, 1344, (11, 12, 13)),
    ):  # fmt: skip
        weight = packed_of(shape)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            grad, x = drawn(weight, 40, dtype)
            there = [a.cuda() if isinstance(a, torch.Tensor) else a for a in weight.op_args()]
            got = torch.ops.lowra.table_gradients(grad.cuda(), x.cuda(), *there)
            for one, two in zip(got, exact(grad, x, weight), strict=True):
                assert close(one.cpu(), two, dtype)


@pytest.mark.parametrize(("n", "k"), [(300, 500), (320, 512)])
@pytest.mark.parametrize("levels", [2, 16, 256])
def test_codes_on_a_device_are_those_of_the_reference(levels: int, n: int, k: int) -> None:
    """Ties that rounding tips are rare."""
    weight, upper, _, scales, columns = feedback_case(n, k, 3, 0)
    tables = torch.randn(n, levels).sort(1)[0]
    gram, start = gram_of(k, 0), torch.zeros(n, k, dtype=torch.uint8)
    for chosen in (scales, None):
        tail = (tables, chosen, columns if chosen is not None else torch.zeros_like(columns))
        there = [None if t is None else t.cuda() for t in (weight, upper, gram, *tail, start)]
        w, u, g, *tail_there, begin = there
        pairs = [
            (torch.ops.lowra.feedback_codes(w, u, *tail_there),
             feedback.feedback_codes(weight, upper, *tail)),
            (torch.ops.lowra.descend_codes(w, g, *tail_there, begin, None, 2)[0],
             feedback.descend_codes(weight, gram, *tail, start, None, 2)[0]),
        ]  # fmt: skip
        for got, want in pairs:
            assert float((got.cpu() != want).float().mean()) < 0.02


@pytest.mark.parametrize("name", ["lloyd_rows", "lloyd_shared", "lloyd_scales"])
def test_codebooks_on_a_device_are_those_of_the_cpu(name: str) -> None:
    rows = rows_of(150, 700, 0, True)
    starts = starts_of([1, 2, 4], 150 if name == "lloyd_rows" else None, 0)
    op = getattr(torch.ops.lowra, name)
    got = op(*(t.cuda() for t in rows), [s.cuda() for s in starts], 60, 1e-6)
    want = op(*rows, starts, 60, 1e-6)
    torch.testing.assert_close([t.cpu() for t in got], list(want), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("everything_travels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_travels_comes_back_as_the_cpu_has_it(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 40, 64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(64, 64, generator=generator).to(dtype) / 8

    def run() -> list[torch.Tensor]:
        q, k, v = (
            torch.nn.functional.linear(x, w).view(2, 40, 4, 16).transpose(1, 2)
            for w in (weight, weight.flip(0), weight.flip(1))
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
        flat = x.detach().view(-1, 64)
        gram = torch.ops.lowra.moments(flat, None)
        root = torch.linalg.cholesky_ex(gram + 40 * torch.eye(64))[0]
        best = torch.ops.lowra.optimal_levels(flat.float().abs(), torch.ones(1, 64), [4])
        return [y, gradient, gram, root, *best]

    want = run()
    with offload(torch.device("cuda"), [weight]) as mode:
        got = run()
    assert len(mode._moved) == 1
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    for one, two in zip(got, want, strict=True):
        assert one.device.type == "cpu"
        assert float((one - two).norm()) <= limit * float(two.norm())
    assert got[0].stride() == want[0].stride()


@pytest.mark.usefixtures("everything_travels")
def test_a_compile_with_its_heavy_work_on_a_device() -> None:
    made = [
        lowra.compile(models.tiny_llama(layers=1), bit_budget=3, device=device, **SMALL)
        for device in ("cuda", "cpu")
    ]
    assert {p.device.type for p in made[0].parameters()} == {"cpu"}
    losses = [sum(s["expected_loss"] for s in m.lowra.report["sites"]) for m in made]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
