"""Adapters in pages by the GPU kernels, in Triton's interpreter, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowra.backends.triton import adapters, service
from lowra.backends.triton.targets import INTERPRETER, TARGETS
from tests.backends.test_adapter_ops import batch, drawn_adapters, expected, held, largest_rank
from tests.compiler.deltas import FORMATS, Drawn, Meaning, site_of

pytest.importorskip("triton", reason="Triton is not installed: pip install 'lowra[triton]'")

# The interpreter cuts where a GPU rounds.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def check(
    drawn: list[Drawn | None], n: int, k: int, m: int, places: int, dtype: torch.dtype, seed: int
) -> None:
    made = [None if d is None else site_of("s", n, k, d) for d in drawn]
    meanings = [None if pair is None else pair[1] for pair in made]
    tables = held([None if pair is None else pair[0] for pair in made], 512)
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(m, size, generator=generator).to(dtype) for size in (k, n))
    slots, weights = batch(m, len(drawn), places, seed)
    given_ = (*tables, slots, weights)
    got = adapters.changed(y, x, given_, largest_rank(tables[1]), INTERPRETER)
    want = expected(y, x, meanings, slots, weights)
    assert got.dtype == dtype and got.shape == y.shape
    assert float((got.double() - want).norm()) <= LIMIT[dtype] * scale_of(y, x, meanings)
    none = (slots < 0).all(dim=1)
    assert torch.equal(got[none], y[none]), "a token without an adapter changed"


def scale_of(y: Tensor, x: Tensor, meanings: list[Meaning | None]) -> float:
    """How large the terms are that are summed."""
    sizes = [1.0, *(float(m.a.norm() * m.b.norm() * m.core.norm()) for m in meanings if m)]
    return float(y.double().norm() + max(sizes) * x.double().norm())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.one_of(st.none(), drawn_adapters()), min_size=1, max_size=3),
    st.integers(1, 150), st.integers(1, 330), st.integers(0, 40), st.integers(1, 2),
    st.sampled_from(list(LIMIT)), st.integers(0, 99),
)  # fmt: skip
def test_mixed_adapters_equal_the_formula(
    drawn: list[Drawn | None], n: int, k: int, m: int, places: int, dtype: torch.dtype, seed: int
) -> None:
    check(drawn, n, k, m, places, dtype, seed)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", [512, 700])
def test_every_format_of_rows(format: str, k: int) -> None:
    """Whole tiles, and a shorter last one; more rows than a product takes at a time."""
    group = -1 if format in ("1.6", "f32") else 128
    drawn = Drawn(((17, format), (2, "f16")), ((19, format),), group, scaling=2.0)
    x, y = torch.randn(5, k), torch.zeros(5, k)
    site, meaning = site_of("s", k, k, drawn)
    tables = held([site], 4096)
    slots, weights = torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1)
    got = adapters.changed(y, x, (*tables, slots, weights), 19, INTERPRETER)
    torch.testing.assert_close(got.double(), meaning(y, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("parts", [("core", "diagonal"), ("post", "out"), ("shared", "core")])
@pytest.mark.parametrize("m", [1, 70])
def test_every_part_of_an_adapter(parts: tuple[str, ...], m: int) -> None:
    """A core with more rows and columns than a product takes at a time, over many chunks."""
    drawn = Drawn(((11, "2"), (9, "f32")), ((18, "3a"),), 32, frozenset(parts))
    check([drawn, None, Drawn(seed=1)], 90, 200, m, 2, torch.float32, m)


def test_the_columns_of_x_are_shared_by_programs_and_summed_in_order() -> None:
    """The same bits every time, whoever is first."""
    assert adapters._parts(4096, 1, 132) == 16 and adapters._parts(4096, 60, 132) == 3
    assert adapters._parts(300, 1, 132) == 2 and adapters._parts(64, 1, 132) == 1


def test_nothing_to_do_gives_y_back() -> None:
    site, _ = site_of("s", 20, 30, Drawn())
    tables = held([site], 512)
    slots, weights = batch(3, 1, 1, 0)
    x, y = torch.randn(3, 30), torch.randn(3, 20)
    empty = (tables[0], tables[1][:0], torch.zeros(2, dtype=torch.int32), *tables[3:])
    got = adapters.changed(y, x, (*empty, slots, weights), 0, INTERPRETER)
    assert torch.equal(got, y) and got is not y
    none = adapters.changed(y[:0], x[:0], (*tables, slots[:0], weights[:0]), 4, INTERPRETER)
    assert none.shape == (0, 20)


def test_where_kernels_fail_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unsupported toolchain")

    monkeypatch.setattr(service, "failures", {})
    monkeypatch.setattr(service, "target_of", lambda device: TARGETS[1])
    monkeypatch.setattr(adapters, "processors", lambda device: 132)
    monkeypatch.setattr(adapters.launch, "anew_where_broken", fail)
    site, meaning = site_of("s", 20, 30, Drawn())
    tables, x, y = held([site], 512), torch.randn(3, 30), torch.randn(3, 20)
    slots, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    for _ in range(2):
        got = adapters.apply_adapters(y, x, *tables, slots, weights, 4)
        torch.testing.assert_close(got.double(), meaning(y, x), rtol=1e-5, atol=1e-5)
    assert len(service.failures) == 1
