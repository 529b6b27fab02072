"""Ranks against widths: shares as an SVD has them, one budget, the best of all small choices."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import lowra
from lowra.compiler.facts import AdapterRank, Assigned, Codebooks, Precision
from lowra.compiler.pipeline import run_pipeline
from lowra.passes import AssignPrecision, FitCodebooks
from lowra.passes.budget.rank_options import _joint, residual_shares
from lowra.passes.budget.relaxation import Rows
from tests.passes.site_programs import compiled
from tests.runtime.compiled_models import stack

WIDTHS = (1, 2, 3, 4)
FITTED = (FitCodebooks(WIDTHS),)


def test_shares_rise_from_nothing_to_everything() -> None:
    program = compiled(FITTED)
    choice = np.zeros(33, dtype=np.int64)
    shares = residual_shares(program, choice, (0, 4, 8, 16, 32))
    assert (shares[:, 0] == 0).all() and (np.diff(shares, axis=1) >= -1e-9).all()
    assert shares[0, 3] == pytest.approx(1)  # 13 rows have no more than rank 13
    assert shares[1, 1] < 1 and shares[1, 4] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(8))
def test_the_joint_program_is_the_best_of_all_choices(seed: int) -> None:
    random = np.random.default_rng(seed)
    cost = np.sort(random.random((4, 2)))[:, ::-1].copy()
    bits = np.tile([1, 3], (4, 1))
    saved = np.sort(random.random((2, 3)), axis=1)
    saved[:, 0] = 0
    sizes = np.tile([0, 2, 5], (2, 1))
    budget = int(random.integers(4, 20))
    site_of = np.array([0, 0, 1, 1])
    plan, chosen = _joint(Rows(cost, bits), budget, saved, sizes, site_of, 1.0)
    best = np.inf
    for widths in itertools.product(range(2), repeat=4):
        for ranks in itertools.product(range(3), repeat=2):
            if bits[range(4), widths].sum() + sizes[range(2), ranks].sum() <= budget:
                value = cost[range(4), widths].sum() - saved[range(2), ranks].sum()
                best = min(best, value)
    assert plan.cost - saved[range(2), chosen].sum() == pytest.approx(best)
    assert plan.bits + sizes[range(2), chosen].sum() <= budget


@pytest.mark.parametrize("budget", [4.0, 9.0])
def test_ranks_are_paid_from_the_budget_and_never_lose(budget: float) -> None:
    fitted = compiled(FITTED)
    plain = run_pipeline(fitted, (AssignPrecision(budget),))
    joint = run_pipeline(fitted, (AssignPrecision(budget, ranks=(0, 4, 8, 16, 32)),))
    proof = joint.fact("up", Assigned).proof
    assert proof.bound is None
    assert proof.bits <= proof.budget
    assert proof.loss <= plain.fact("up", Assigned).proof.loss * (1 + 1e-9)
    ranks = {site.name: joint.fact(site.name, AdapterRank).rank for site in joint.sites}
    assert ranks["up"] <= 13 and ranks["down"] <= 20
    if budget == 9.0:  # every row is at 4 bit already: what is left can only buy ranks
        assert max(ranks.values()) > 0
        widths = joint.fact("down", Codebooks).widths
        assert set(joint.fact("down", Precision).row_widths.tolist()) == {max(widths)}


def test_a_model_compiles_with_ranks_of_its_own_and_replays(tmp_path: Any) -> None:
    x = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    options = {"bit_budget": 14, "widths": (1, 2, 3, 4), "rank": "auto"}
    model: Any = lowra.compile(stack(), example=(x,), **options)
    report = model.lowra.report
    ranks = {site["name"]: site["rank"] for site in report["sites"]}
    assert max(ranks.values()) > 0
    counted = report["totals"]["stored_bits"] + report["totals"]["adapter_bits"]
    assert counted <= 14
    again: Any = lowra.compile(stack(), example=(x,), plan=model.lowra.plan)
    assert {site["name"]: site["rank"] for site in again.lowra.report["sites"]} == ranks
    lowra.save(model, tmp_path / "saved")
    loaded = lowra.load(tmp_path / "saved", stack())
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_siblings_get_one_width_end_to_end() -> None:
    class Fork(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
            self.down = torch.nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x) * self.gate(x))

    torch.manual_seed(0)
    model, x = Fork(), torch.randn(2, 8, 64)
    options = {"bit_budget": 4.3, "example": (x,), "rank": 0}
    done: Any = lowra.compile(model, unit="siblings", **options)
    rows = {site["name"]: site["rows"] for site in done.lowra.report["sites"]}
    assert len(rows["up"]) == 1 and rows["up"] == rows["gate"] and len(rows["down"]) == 1
    with pytest.raises(lowra.LowraError, match="one width to up, gate, but pins"):
        lowra.plan(model, unit="siblings", pins={"up": 2, "gate": 4}, **options)
