"""GPU products in integers, in Triton's interpreter: against the same integers in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

import lowra
from lowra.backends import activations
from lowra.backends.reference.integers import integer_product
from lowra.backends.triton import build, integer, launch, linear, schedule, service
from lowra.backends.triton.integer_codes import _PLAIN
from lowra.backends.triton.keys import IntegerKey, LinearKey, QuantizeKey, weight_key
from lowra.backends.triton.targets import INTERPRETER, TARGETS
from lowra.backends.triton.weight import weight_of
from lowra.compiler.storage import PackedWeight
from tests.backends.ptx import prmt
from tests.backends.test_cpu_product import Shape, packed_of
from tests.backends.test_triton_linear import distance

triton = pytest.importorskip("triton", reason="Triton is not installed: lowra[triton]")
LIMIT = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
"""Sums in float32; the interpreter cuts bfloat16 where a GPU rounds."""


@pytest.fixture(autouse=True)
def integers() -> Iterator[None]:
    with activations.activations("int8"):
        yield


def product(packed: PackedWeight, x: torch.Tensor, fine: bool) -> torch.Tensor:
    weight = weight_of(packed.op_args())
    given = (weight, x.shape[0], x.dtype, fine, INTERPRETER, 0, "", False, x.device)
    return integer.product(x, weight, integer.planned(*given), None)


def check(shape: Shape, m: int, fine: bool, dtype: torch.dtype = torch.float32) -> None:
    packed = packed_of(shape)
    x = (torch.randn(m, shape.k) * torch.rand(shape.k).exp()).to(dtype)
    y = product(packed, x, fine)
    want = integer_product(x, packed.op_args(), fine)
    # What `fine` leaves out: second levels of x by second levels of a codebook.
    assert y.dtype == dtype and distance(y, want) < LIMIT[dtype] + (1.5e-4 if fine else 0)
    exact = x.double() @ packed.dequantize(torch.float64).T
    assert distance(y, exact) < (2e-4 if fine else 3e-2) + LIMIT[dtype]


@pytest.mark.parametrize("fine", [False, True], ids=["int8", "int16"])
@pytest.mark.parametrize("k", [20, 250, 256, 321, 1000, 1610])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 9, 11, 12, 13])
def test_rows_of_one_width(width: int, k: int, fine: bool) -> None:
    check(Shape(19, k, (width,), shared=k % 2 == 0), 1, fine)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("m", [1, 2])
def test_mixed_widths_of_a_few_tokens(m: int, dtype: torch.dtype) -> None:
    check(Shape(53, 600, (1, 2, 3, 4, 9)), m, m == 2, dtype)


@pytest.mark.parametrize("fine", [False, True], ids=["int8", "int16"])
def test_trellis_codes_beside_plain_ones(fine: bool) -> None:
    """Tiles that begin within a run, and rows of several runs."""
    check(Shape(290, 600, (11, 12, 13, 4)), 2, fine)


def test_weights_without_scales() -> None:
    check(Shape(21, 96, (1, 2), 0), 1, False)


def test_parts_of_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among more programs than there are words for the last of them."""
    monkeypatch.setattr(schedule, "INTERPRETED_PROCESSORS", 64)
    monkeypatch.setattr(schedule, "INTEGER_PART", 300)
    for widths in ((2,), (9, 1)):
        check(Shape(20, 2700, widths), 2, False)


@pytest.mark.parametrize("rank", [0, 8, 20])
@pytest.mark.parametrize("kind", ["int8", "int16"])
def test_the_op_with_all_that_belongs_to_it(kind: str, rank: int) -> None:
    """Rotation, bias, factors; to the same numbers as without integers, nearly."""
    lowra.set_activations(kind)
    packed = packed_of(Shape(40, 576, (2, 9), block=64))
    x, bias = torch.randn(2, 1, 576).bfloat16(), torch.randn(40).bfloat16()
    factors = None
    want = x.double() @ packed.dequantize(torch.float64).T + bias.double()
    if rank:
        a, b = torch.randn(rank, 576).bfloat16() / 8, torch.randn(40, rank).bfloat16()
        factors = (a, b, 0.5)
        want += 0.5 * (x.double() @ a.double().T) @ b.double().T
    y = linear.forward(x, packed.op_args(), bias, factors, INTERPRETER)
    assert y.shape == want.shape and distance(y, want) < {"int8": 2.5e-2, "int16": 1e-2}[kind]
    assert kernels_of(packed) == {kind}


def kernels_of(packed: PackedWeight) -> set[str]:
    plans = weight_of(packed.op_args()).form.plans.values()
    launchers = [plan.multiply for plan in plans if isinstance(plan, integer.Plan)]
    launchers += [plan[0] for plan in plans if isinstance(plan, tuple)]
    return {launcher.name.split("-")[0] for launcher in launchers}


@pytest.mark.parametrize(
    ("m", "dtype", "kind", "shape"),
    [
        (3, torch.bfloat16, "int8", Shape(21, 96, (2,))),
        (3, torch.bfloat16, "int16", Shape(21, 96, (2,))),
        (1, torch.float32, "int8", Shape(21, 96, (2,))),
        (1, torch.bfloat16, "bfloat16", Shape(21, 96, (2,))),
        (1, torch.bfloat16, "int8", Shape(21, 96, (2, 8))),
        (1, torch.bfloat16, "int8", Shape(21, 96, (2,), 32)),
    ],
    ids=["many tokens", "many for int16", "float32", "not allowed", "8 bits", "groups"],
)
def test_others_are_multiplied_as_they_are(
    m: int, dtype: torch.dtype, kind: str, shape: Shape
) -> None:
    lowra.set_activations(kind)
    packed = packed_of(shape)
    x = torch.randn(m, 96).to(dtype)
    y = linear.forward(x, packed.op_args(), None, None, INTERPRETER)
    assert distance(y, x.double() @ packed.dequantize(torch.float64).T) < 1e-2
    assert kernels_of(packed) == {"linear"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_input_breaks_its_token_alone(value: float) -> None:
    packed = packed_of(Shape(21, 96, (1, 2)))
    x = torch.randn(3, 96)
    x[1, 70] = value
    y = product(packed, x, False)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-31])
def test_next_to_nothing_gives_next_to_nothing(size: float) -> None:
    """A step would be so small that it has no inverse. Read as the reference does."""
    packed = packed_of(Shape(21, 96, (1, 2, 9)))
    x = torch.full((1, 96), size)
    y = product(packed, x, True)
    assert y.abs().max() <= 1e-28
    want = integer_product(x, packed.op_args(), True)
    assert (y - want).abs().max() <= 1e-36 + 1e-4 * want.abs().max()


@pytest.mark.parametrize("broken", [QuantizeKey, IntegerKey])
def test_a_kernel_that_fails_is_replaced(broken: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one that multiplies what it is given; from then on nothing is launched for it."""
    launched: list[type] = []

    def noted(launcher: launch.Launcher, *given: object) -> None:
        launched.append(type(launcher.key))
        if isinstance(launcher.key, broken):
            raise service.KernelError(launcher.name, "made up")
        run(launcher, *given)

    run = launch.run
    monkeypatch.setattr(service, "failures", {})
    monkeypatch.setattr(launch, "run", noted)
    packed = packed_of(Shape(21, 96, (2,)))
    x = torch.randn(1, 96).bfloat16()
    for first in (True, False):
        y = linear.forward(x, packed.op_args(), None, None, INTERPRETER)
        assert distance(y, x.double() @ packed.dequantize(torch.float64).T) < 1e-2
        assert (broken in launched) == first and launched[-1] is LinearKey
        assert first or launched == [LinearKey]
        launched.clear()


def test_functions_spelt_out_are_the_instructions_that_they_stand_for() -> None:
    """Of what the interpreter runs and a GPU does not."""
    body = """
    i = tl.arange(0, 64)
    x, y, z = tl.load(a + i), tl.load(b + i), tl.load(c + i)
    tl.store(out + i, permute(x, y, z))
    tl.store(out + 64 + i, dot4(x, y, z))
    tl.store(out + 128 + i, digits(x, y))
"""
    header = "import triton\nimport triton.language as tl\n\n"
    source = header + _PLAIN + "\n@triton.jit\ndef kernel(a, b, c, out):" + body
    draw = random.Random(5)
    words = [[draw.randrange(-(1 << 31), 1 << 31) for _ in range(64)] for _ in "abc"]
    words[2] = [word & 0x77777777 for word in words[2]]
    given = [torch.tensor(word, dtype=torch.int32) for word in words]
    out = torch.empty(192, dtype=torch.int32)
    build.load("spelt-out", source, interpreted=True)[(1,)](*given, out)
    unsigned = [[w & 0xFFFFFFFF for w in word] for word in words]
    for i, (a, b, c) in enumerate(zip(*unsigned, strict=True)):
        assert int(out[i]) & 0xFFFFFFFF == prmt(a, b, c & 0xFFFF)
        assert int(out[128 + i]) & 0xFFFFFFFF == prmt(a, b, 0x7351)
    bytes_ = [word.view(torch.int8).view(64, 4).long() for word in given[:2]]
    assert torch.equal(out[64:128], ((bytes_[0] * bytes_[1]).sum(1) + given[2]).int())


def test_targets_without_byte_permutes_are_left_out() -> None:
    weight = weight_key([2, 64], 256, -1, False, False)
    for target in TARGETS:
        assert integer.takes(weight, 256, 1, target) == target.permutes
