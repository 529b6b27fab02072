"""Two adapters compared: against dense products, whatever form each is in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowra
from lowra.adapters.factors import LowRank
from lowra.compiler.errors import AdapterError
from lowra.runtime.packed_adapter_files import read_packed
from lowra.workflows.diff_adapters import diff_adapters
from tests.adapters.adapters import dense, low_rank, peft_folder

SITES = [low_rank(name="up"), low_rank(160, 96, name="down", seed=1)]


def scaled(site: LowRank) -> Tensor:
    return site.scaling * dense(site)


def test_two_plain_adapters_against_their_dense_products(tmp_path: Path) -> None:
    other = [low_rank(name="up", rank=3, seed=5, decay=0.5), low_rank(96, 160, 3, name="extra")]
    one = peft_folder(tmp_path / "one", SITES)
    two = peft_folder(tmp_path / "two", other)
    data = diff_adapters(one, two)
    (row,) = data["sites"]
    p, q = scaled(SITES[0]), scaled(other[0])
    assert row["difference"] == pytest.approx(float((p - q).norm() / p.norm()))
    assert row["cosine"] == pytest.approx(float((p * q).sum() / p.norm() / q.norm()))
    assert data["difference"] == pytest.approx(row["difference"])
    for side, product, rank in (("first", p, 8), ("second", q, 3)):
        found, sigma = row[side], torch.linalg.svdvals(product)[:rank]
        assert (found["rank"], found["stored_bits"]) == (rank, 32)
        torch.testing.assert_close(torch.tensor(found["sigma"]).double(), sigma, rtol=1e-4, atol=0)
        assert found["norm"] == pytest.approx(float(product.norm()), rel=1e-5)
        assert 1 <= found["directions_90"] <= rank
    assert (data["only_first"], data["only_second"]) == (["down"], ["extra"])


def test_a_packed_adapter_differs_by_the_error_that_it_reports(tmp_path: Path) -> None:
    plain = peft_folder(tmp_path / "plain", SITES)
    done = lowra.compress_adapter(plain, tmp_path / "packed", bit_budget=1.8)
    data = diff_adapters(plain, tmp_path / "packed")
    assert data["stored_bits"] == [32, pytest.approx(done.stored_bits)]
    assert data["difference"] ** 2 == pytest.approx(done.error, rel=1e-3)
    errors = read_packed(tmp_path / "packed").errors
    for row in data["sites"]:
        assert row["difference"] ** 2 == pytest.approx(errors[row["name"]], rel=2e-3)


def test_an_adapter_does_not_differ_from_itself(tmp_path: Path) -> None:
    plain = peft_folder(tmp_path / "plain", SITES)
    data = diff_adapters(plain, plain)
    assert data["difference"] < 1e-6 and not data["only_first"] and not data["only_second"]


def test_a_site_that_is_zero_has_no_relative_difference(tmp_path: Path) -> None:
    zero = LowRank("up", SITES[0].a, torch.zeros_like(SITES[0].b), 1.0)
    data = diff_adapters(
        peft_folder(tmp_path / "a", [zero]), peft_folder(tmp_path / "b", [SITES[0]])
    )
    assert data["sites"][0]["difference"] is None and data["sites"][0]["cosine"] == 0


def test_adapters_of_other_shapes_are_refused(tmp_path: Path) -> None:
    one = peft_folder(tmp_path / "one", [low_rank(name="up")])
    two = peft_folder(tmp_path / "two", [low_rank(96, 128, name="up")])
    with pytest.raises(AdapterError, match=r"up is \[96, 160\] in the first.*\[96, 128\]"):
        diff_adapters(one, two)
