"""Adapters in pages, applied as their codes lie, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.backends.cpu import toolchain
from lowra.backends.reference.adapters import apply_adapters as reference
from lowra.compiler.adapter_delta import Shared, SiteDelta, runs_of
from lowra.compiler.adapter_pages import CHUNK, A
from lowra.compiler.errors import AdapterError
from lowra.runtime.serving.pages import Memory, lay_out
from tests.compiler.deltas import FORMATS, Drawn, Meaning, site_of

OPS = torch.ops.lowra
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PARTS = ("core", "diagonal", "out", "post", "shared")


@st.composite
def drawn_adapters(draw: st.DrawFn) -> Drawn:
    def rows(rank: int) -> tuple[tuple[int, str], ...]:
        first = draw(st.integers(1, rank))
        counts = [count for count in (first, rank - first) if count]
        return tuple((count, draw(st.sampled_from(FORMATS))) for count in counts)

    rank = draw(st.integers(1, 9))
    inner = draw(st.sampled_from([rank, rank, draw(st.integers(1, 9))]))
    parts = frozenset(draw(st.lists(st.sampled_from(PARTS), max_size=3)))
    group = draw(st.sampled_from([-1, 32, 37]))
    scaling = draw(st.sampled_from([0.5, 2.0, -1.0]))
    return Drawn(rows(rank), rows(inner), group, parts, scaling, draw(st.integers(0, 999)))


def held(sites: list[SiteDelta | None], page_words: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """pages, chunks, bounds and scalings of adapters at one linear, in shuffled pages."""
    memory = Memory(400, page_words, torch.device("cpu"))
    memory.give_back([memory._free.pop(0) for _ in range(3)])
    lines, bounds = [torch.zeros(0, 7, dtype=torch.int32)], [0]
    for site in sites:
        if site is not None:
            parts = [(("", role), runs_of(part)) for role, part in site.parts.items()]
            image = lay_out(parts, page_words)
            lines.append(image.placed(memory.put(image)))
        bounds.append(sum(map(len, lines)))
    scalings = torch.tensor([0.0 if site is None else site.scaling for site in sites])
    return memory.words, torch.cat(lines), torch.tensor(bounds, dtype=torch.int32), scalings


def largest_rank(chunks: Tensor) -> int:
    """The most rows that an A of chunks [c, 7] has; 0 without."""
    of_a = chunks[chunks[:, 0] == A]
    return int(of_a[:, 1:3].sum(1).max()) if len(of_a) else 0


def expected(
    y: Tensor, x: Tensor, meanings: list[Meaning | None], slots: Tensor, weights: Tensor
) -> Tensor:
    """Token by token, in float64."""
    rows = []
    for t in range(len(y)):
        total = y[t].double()
        for j in range(slots.shape[1]):
            meaning = meanings[int(slots[t, j])] if slots[t, j] >= 0 else None
            if meaning is not None:
                total = total + weights[t, j].double() * (meaning(y[t], x[t]) - y[t].double())
        rows.append(total)
    return torch.stack(rows) if rows else y.double()


def batch(m: int, count: int, places: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random slots int32 [m, places], -1 among them, and weights."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, count, (m, places), generator=generator, dtype=torch.int32)
    return slots, torch.rand(m, places, generator=generator) + 0.25


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.none(), drawn_adapters()), min_size=1, max_size=4),
    st.integers(1, 70), st.integers(1, 330), st.integers(0, 40), st.integers(1, 2),
    st.sampled_from(list(TOLERANCE)), st.integers(0, 99),
)  # fmt: skip
def test_mixed_adapters_equal_the_formula(
    drawn: list[Drawn | None], n: int, k: int, m: int, places: int, dtype: torch.dtype, seed: int
) -> None:
    made = [None if d is None else site_of("site", n, k, d) for d in drawn]
    meanings = [None if pair is None else pair[1] for pair in made]
    tables = held([None if pair is None else pair[0] for pair in made], 512)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(m, size, generator=generator).to(dtype) for size in (k, n))
    slots, weights = batch(m, len(drawn), places, seed)
    want = expected(y, x, meanings, slots, weights)
    for op in (OPS.apply_adapters, reference):
        got = op(y, x, *tables, slots, weights, largest_rank(tables[1]))
        assert got.dtype == dtype
        scale = 1 + sum((m.a.norm() * m.b.norm() * m.core.norm() for m in meanings if m), 0.0)
        torch.testing.assert_close(
            got.double() / scale, want / scale, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )
        none = (slots < 0).all(dim=1)
        assert torch.equal(got[none], y[none]), "a token without an adapter changed"


@pytest.mark.parametrize("parts", [(), ("post", "out"), ("core", "diagonal"), ("shared",)])
def test_gradients_to_outputs_inputs_and_weights(parts: tuple[str, ...]) -> None:
    drawn = Drawn(((2, "f32"), (1, "3")), ((3, "2"),), parts=frozenset(parts))
    sites = [site_of("s", 6, 9, drawn)[0], site_of("s", 6, 9, Drawn(seed=3))[0]]
    pages, chunks, bounds, scalings = held(sites, 512)
    slots = torch.tensor([[0, -1], [1, 0], [-1, -1], [0, 1]], dtype=torch.int32)
    x, y, w = (torch.randn(4, size, dtype=torch.float64) for size in (9, 6, 2))

    def run(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return OPS.apply_adapters(y, x, pages, chunks, bounds, scalings, slots, w, 3)

    inputs = [t.requires_grad_() for t in (y, x, w)]
    assert torch.autograd.gradcheck(run, inputs)


def test_the_op_passes_torchs_own_checks() -> None:
    sites = [site_of("s", 6, 9, Drawn(parts=frozenset({"post"})))[0]]
    slots, weights = batch(5, 1, 1, 0)
    x, y = torch.randn(5, 9, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    arguments = (y, x, *held(sites, 512), slots, weights, 4)
    torch.library.opcheck(OPS.apply_adapters.default, arguments)


def test_rows_of_one_linear_may_lie_in_many_pages() -> None:
    drawn = Drawn(((20, "2"), (9, "f32")), ((29, "3a"),))
    site, meaning = site_of("s", 40, 300, drawn)
    tables = held([site], 512)
    used = {int(at) // 512 for at in tables[1][:, -1]}
    assert len(used) > 5
    x, y, slots = torch.randn(3, 300), torch.randn(3, 40), torch.zeros(3, 1, dtype=torch.int32)
    got = OPS.apply_adapters(y, x, *tables, slots, torch.ones(3, 1), 29)
    torch.testing.assert_close(got.double(), meaning(y, x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(part, Shared) for part in site.parts.values())


@pytest.mark.skipif(toolchain.find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("role", 6), ("rows", 0), ("rows", 5000), ("format", 17), ("format", 35), ("format", 0),
        ("columns", 20), ("group", 0), ("at", -1), ("at", 400 * 512 - 1), ("first", -1),
    ],
)  # fmt: skip
def test_chunks_that_leave_the_pages_or_do_not_fit_are_refused(column: str, value: int) -> None:
    """The kernel reads memory by what they say."""
    site, _ = site_of("s", 40, 300, Drawn())
    pages, chunks, bounds, scalings = held([None, site], 512)
    chunks[0, CHUNK.index(column)] = value
    slots = torch.ones(3, 1, dtype=torch.int32)
    with pytest.raises(AdapterError, match=r"chunks of slot 1.*linear \[40, 300\]"):
        OPS.apply_adapters(
            torch.zeros(3, 40), torch.zeros(3, 300), pages, chunks, bounds, scalings, slots,
            torch.ones(3, 1), 4,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("slots", "weights"), [((5, 2), (5, 2)), ((3, 2), (5, 2)), ((5, 2), (3, 2)), ((3, 2), (3, 1))]
)
@pytest.mark.parametrize("op", [OPS.apply_adapters, reference], ids=["kernel", "reference"])
def test_slots_and_weights_of_other_rows_are_refused(
    op: Any, slots: tuple[int, int], weights: tuple[int, int]
) -> None:
    """The kernel reads memory by the rows of x."""
    tables = held([site_of("s", 40, 300, Drawn())[0]], 512)
    which = torch.zeros(slots, dtype=torch.int32)
    with pytest.raises(AdapterError, match=r"x \[3, 300\].*slots \[.*weights \["):
        op(torch.zeros(3, 40), torch.zeros(3, 300), *tables, which, torch.ones(weights), 4)


def test_the_same_with_any_number_of_threads() -> None:
    made = [site_of("s", 96, 160, Drawn(seed=i))[0] for i in range(3)]
    tables = held(list(made), 512)
    slots, weights = batch(50, 3, 2, 0)
    x, y = torch.randn(50, 160), torch.randn(50, 96)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(OPS.apply_adapters(y, x, *tables, slots, weights, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
