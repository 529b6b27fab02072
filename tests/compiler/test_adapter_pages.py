"""Runs of rows as words and back; parts that do not fit are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowra.compiler.adapter_delta import AdapterDelta, SiteDelta, dense_site
from lowra.compiler.adapter_pages import A, B, chunk_words, dense_run, packed_runs, read_chunk
from lowra.compiler.errors import AdapterError
from tests.compiler.deltas import DTYPES, FORMATS, GRIDS, Drawn, factor, site_of

DRAWN = settings(max_examples=60, deadline=None, derandomize=True)


@DRAWN
@given(
    st.sampled_from(GRIDS), st.integers(1, 9), st.integers(1, 700),
    st.sampled_from([-1, 32, 50]), st.data(),
)  # fmt: skip
def test_any_part_of_a_packed_factor_reads_back_from_words(
    format: str, rows: int, columns: int, group: int, data: st.DataObject
) -> None:
    packed = factor(((rows, format),), columns, group, torch.Generator().manual_seed(columns))
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    (run,) = packed_runs(packed)
    part = run.part(start, stop)
    words = torch.from_numpy(part.words())
    assert len(words) == chunk_words(run.format, stop - start, columns, group)
    pages = torch.cat((torch.full((3,), -1, dtype=torch.int32), words))
    line = (A, 0, stop - start, run.format, columns, group, 3)
    assert torch.equal(read_chunk(pages, line), packed.dequantize()[start:stop])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("columns", [1, 8, 33])
def test_dense_rows_read_back_bit_for_bit(dtype: torch.dtype, columns: int) -> None:
    values = torch.randn(5, columns).to(dtype)
    run = dense_run(values)
    words = torch.from_numpy(run.words())
    assert len(words) == chunk_words(run.format, 5, columns, -1)
    assert torch.equal(read_chunk(words, (B, 0, 5, run.format, columns, -1, 0)), values.float())


def test_rows_of_another_dtype_are_refused() -> None:
    with pytest.raises(AdapterError, match="float64.*float32"):
        dense_run(torch.zeros(2, 3, dtype=torch.float64))


def test_rows_that_are_not_finite_are_refused() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(AdapterError, match=r"rows \[2, 3\] of an adapter hold NaN or infinity"):
            dense_run(torch.full((2, 3), value))


def test_an_adapter_counts_the_bytes_of_its_rows() -> None:
    sites = [dense_site("a", torch.zeros(2, 4), torch.zeros(6, 2), 1.0)]
    assert AdapterDelta({s.name: s for s in sites}).own_bytes() == 4 * (2 * 4 + 6 * 2)
    shared, _ = site_of("a", 6, 4, Drawn(parts=frozenset({"shared", "diagonal"})))
    delta = AdapterDelta({"a": shared})
    assert delta.own_bytes() == 4 * 4 and len(delta.bases) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_equal_bases_have_equal_ids(format: str) -> None:
    ids = set()
    for seed in (0, 0, 1):
        drawn = Drawn(a=((3, format),), b=((3, format),), parts=frozenset({"shared"}), seed=seed)
        ids |= set(AdapterDelta({"a": site_of("a", 6, 40, drawn)[0]}).bases)
    assert len(ids) == 2


def test_parts_that_do_not_fit_are_refused() -> None:
    rows = (dense_run(torch.zeros(2, 4)),)
    with pytest.raises(AdapterError, match=r"adapter of up: B is \[2, 4\], not \[2, 6\]"):
        SiteDelta("up", 6, 4, 1.0, {A: rows, B: rows})
    with pytest.raises(AdapterError, match="rank of 1 or more"):
        SiteDelta("up", 6, 4, 1.0, {A: (), B: ()})
    with pytest.raises(AdapterError, match="without a single linear"):
        AdapterDelta({})
