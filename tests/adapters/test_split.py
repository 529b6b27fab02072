"""Where LoRAQuant cuts, by the paper and by the authors' code, and the published bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowra.adapters.split import PAPER, RELEASED, formula_bits, split_rank

GEOMETRIC = 3 * 0.8 ** torch.arange(16)

SPECTRA = st.lists(st.floats(1e-3, 10), min_size=1, max_size=16).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


def test_the_papers_cut_covers_rho_and_the_codes_falls_short() -> None:
    # adapters.md, 1.3: at rho = 0.8 the paper's rule keeps 4 directions, the code's 3 (0.739)
    assert split_rank(GEOMETRIC, 0.8, PAPER) == 4
    assert split_rank(GEOMETRIC, 0.8, RELEASED) == 3


@given(SPECTRA, st.floats(0.01, 1.0))
def test_the_papers_cut_is_the_smallest_that_covers_rho(sigma: torch.Tensor, rho: float) -> None:
    high = split_rank(sigma, rho)
    covered = sigma.square().cumsum(0) / sigma.square().sum()
    assert 1 <= high <= len(sigma)
    assert covered[high - 1] >= min(rho, 1 - 1e-12) - 1e-9
    assert high == 1 or covered[high - 2] < rho


@given(SPECTRA, st.floats(0.01, 1.0))
def test_the_codes_cut_is_one_less_and_at_least_one(sigma: torch.Tensor, rho: float) -> None:
    assert split_rank(sigma, rho, RELEASED) == max(split_rank(sigma, rho, PAPER) - 1, 1)


def test_rho_one_takes_all_and_a_zero_spectrum_takes_one() -> None:
    assert split_rank(GEOMETRIC, 1.0) == 16
    assert split_rank(torch.zeros(4), 0.8) == 1


@pytest.mark.parametrize(
    ("code_bits", "bits", "published"),
    [(1.52, 2, 1.65), (1.68, 2, 1.82), (2.04, 3, 2.18), (2.36, 3, 2.50)],
)
def test_the_formula_gives_the_published_bits(code_bits: float, bits: int, published: float):
    share = (code_bits - 1) / (bits - 1)  # code_bits = share * bits + (1 - share)
    assert round(formula_bits(share, bits), 2) == pytest.approx(published, abs=0.011)
