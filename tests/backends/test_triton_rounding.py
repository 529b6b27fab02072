"""Error feedback and coordinate descent by the GPU kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lowra.backends.reference import feedback
from lowra.backends.triton import rounding, service
from lowra.backends.triton.targets import INTERPRETER, TARGETS
from tests.backends.test_cpu_fitting import feedback_case, generator_of, gram_of

pytest.importorskip("triton", reason="Triton is not installed: pip install 'lowra[triton]'")

# Shrinking would take minutes: the interpreter is slow.
DRAWN = settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
ROWS, COLUMNS, SEEDS = st.integers(1, 40), st.integers(1, 80), st.integers(0, 999)
GROUPS = st.sampled_from([0, 1, 3])


@DRAWN
@given(ROWS, COLUMNS, SEEDS, GROUPS)
def test_feedback_codes(n: int, k: int, seed: int, groups: int) -> None:
    weight, upper, tables, scales, columns = feedback_case(n, k, max(groups, 1), seed)
    case = (weight, upper, tables, scales if groups else None, columns)
    got, want = rounding.fed_back(*case, INTERPRETER), feedback.feedback_codes(*case)
    assert got.dtype == torch.uint8 and got.is_contiguous()
    # A tie that rounding tips sends a row elsewhere; but rows are many and ties are rare.
    assert int((got != want).any(1).sum()) <= 1 + n // 20


@DRAWN
@given(ROWS, COLUMNS, SEEDS, GROUPS)
def test_descend_codes(n: int, k: int, seed: int, groups: int) -> None:
    weight, _, tables, scales, columns = feedback_case(n, k, max(groups, 1), seed)
    gram, start = gram_of(k, seed), torch.zeros(n, k, dtype=torch.uint8)
    case = (weight, gram, tables, scales if groups else None, columns)
    first, known = rounding.descended(*case, start, None, 1, INTERPRETER)
    want, _ = feedback.descend_codes(*case, start, None, 1)
    assert int((first != want).any(1).sum()) <= 1 + n // 20
    error = (weight - feedback.values_of(*case[2:], first).T).double()
    torch.testing.assert_close(known.double(), error @ gram.double(), rtol=1e-3, atol=1e-3)
    kept = known.clone()
    twice, _ = rounding.descended(*case, start, None, 2, INTERPRETER)
    again, _ = rounding.descended(*case, first, known, 1, INTERPRETER)
    assert int((again != twice).any(1).sum()) <= 1 + n // 20
    assert torch.equal(known, kept) and int(start.max()) == 0, "nothing given is written to"


@pytest.mark.parametrize("n, k", [(1, 40), (5, 1)])
def test_nothing_given_is_written_to(n: int, k: int) -> None:
    """Transposed, a single row is the same memory."""
    case = feedback_case(n, k, 1, 0)
    weight, _, *rest = case
    start, slope = torch.ones(n, k, dtype=torch.uint8), torch.randn(n, k)
    before = [tensor.clone() for tensor in (*case, start, slope)]
    feedback.feedback_codes(*case)
    rounding.fed_back(*case, INTERPRETER)
    feedback.descend_codes(weight, gram_of(k, 0), *rest, start, slope, 1)
    rounding.descended(weight, gram_of(k, 0), *rest, start, slope, 1, INTERPRETER)
    assert all(map(torch.equal, before, (*case, start, slope)))


def test_tables_of_eight_bits() -> None:
    weight, upper, _, scales, columns = feedback_case(40, 70, 2, 5)
    tables = torch.randn(40, 256, generator=generator_of(1)).sort(1)[0]
    case = (weight, upper, tables, scales, columns)
    got, want = rounding.fed_back(*case, INTERPRETER), feedback.feedback_codes(*case)
    assert float((got != want).float().mean()) < 0.02


def test_runs_of_trellis_codes_are_left_to_the_cpu() -> None:
    weight, upper, tables, scales, columns = feedback_case(9, 30, 2, 0)
    tables, runs = tables[:, :1] + torch.arange(4.0), torch.zeros(9, dtype=torch.int64)
    rest = (tables, scales, columns)
    got = rounding.feedback_codes(weight, upper, *rest, runs)
    assert torch.equal(got, feedback.feedback_codes(weight, upper, *rest, runs))
    assert got.any(), "codes of level 0 alone are on no path"
    alone = rounding.feedback_codes(weight, None, *rest)
    assert torch.equal(alone, feedback.feedback_codes(weight, None, *rest))
    moved, _ = rounding.descend_codes(weight, gram_of(30, 0), *rest, got, None, 1, runs)
    want, _ = feedback.descend_codes(weight, gram_of(30, 0), *rest, got, None, 1, runs)
    assert torch.equal(moved, want)


def test_where_kernels_fail_plain_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unsupported toolchain")

    monkeypatch.setattr(service, "failures", {})
    monkeypatch.setattr(service, "target_of", lambda device: TARGETS[1])
    monkeypatch.setattr(rounding.launch, "anew_where_broken", fail)
    case = feedback_case(9, 30, 2, 0)
    start = torch.zeros(9, 30, dtype=torch.uint8)
    weight, _, *rest = case
    for _ in range(2):
        assert torch.equal(rounding.feedback_codes(*case), feedback.feedback_codes(*case))
        got = rounding.descend_codes(weight, gram_of(30, 0), *rest, start, None, 1)
        want = feedback.descend_codes(weight, gram_of(30, 0), *rest, start, None, 1)
        assert all(map(torch.equal, got, want))
    assert len(service.failures) == 2  # one that feeds back, one that descends
