"""A measured plan: what a compile would choose, with its expected loss, ready to be replayed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowra
from lowra.compiler.errors import BudgetError, CaptureError, RecipeError
from lowra.workflows.plan_file import decode_widths, read_plan, write_plan
from lowra.workflows.planning import Plan
from tests import models
from tests.runtime.compiled_models import (
    SMALL,
    compiled_stack,
    one_layer_llama,
    remembered_capture,
    stack,
)

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
STACK: dict[str, Any] = {"bit_budget": 3.5, "rank": 4}
LLAMA: dict[str, Any] = {**SMALL, "bit_budget": 3}


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowra.api.capture", remembered_capture)


def measured(**options: Any) -> Plan:
    return lowra.plan(stack(), measure=True, example=(X,), **(STACK | options))


def compiled(**options: Any) -> Any:
    return lowra.compile(stack(), example=(X,), **options)


@functools.cache
def llama_plan() -> Plan:
    return lowra.plan(one_layer_llama(), measure=True, **LLAMA)


def tensors_of(model: nn.Module) -> dict[str, bytes]:
    state = model.state_dict()
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in state.items()}


def test_it_chooses_what_the_compile_would_choose() -> None:
    plan, then = measured(), compiled_stack().compiled.lowra.plan  # pyright: ignore
    for planned, done in zip(plan.sites, then["sites"], strict=True):
        assert planned["row_widths"] == done["row_widths"]
        assert planned["rows"].items() == {w: n for w, n in done["rows"].items() if n}.items()
    assert plan.assignment == then["assignment"]
    assert plan.fingerprint == then["fingerprint"] != ""


def test_a_compile_replays_it_to_the_bytes_of_a_compile_without_it(tmp_path: Path) -> None:
    file = write_plan(measured().file_data(), tmp_path / "plan.json")
    replayed = compiled(plan=file)
    assert "replay-precision" in replayed.lowra.report["pipeline"]
    assert tensors_of(replayed) == tensors_of(compiled(**STACK))


def test_its_sizes_are_those_of_the_compile() -> None:
    for options in ({}, {"rank": "auto"}, {"count_adapters": True}, {"correction_rank": 2}):
        plan, model = measured(**options), compiled(**(STACK | options))
        totals = model.lowra.report["totals"]
        assert plan.measured is not None
        assert plan.measured["stored_bits"] == pytest.approx(totals["stored_bits"])
        assert plan.measured["stored_bytes"] == totals["bytes"]
        assert plan.file_bytes == model.lowra.plan["file_bytes"]


def test_the_loss_adds_up_over_sites_and_comes_with_proof_price_and_unit() -> None:
    plan = llama_plan()
    found = plan.assignment
    assert found is not None and plan.measured is not None
    assert found["unit"] == "nats per token"
    assert sum(site["expected_loss"] for site in plan.sites) == pytest.approx(
        found["expected_loss"]
    )
    assert min(site["expected_loss"] for site in plan.sites) > 0
    assert 0 <= found["gap"] < 1e-3 and found["price_of_a_bit"] > 0
    assert plan.measured["calibration_tokens"] > 0
    rows = sum(site["shape"][0] for site in plan.sites)
    assert sum(plan.measured["rows"].values()) == rows
    for stage in ("capture", "calibration", "collect-statistics", "fit-codebooks", "total"):
        assert plan.measured["seconds"][stage] > 0
    assert "quantize-weights" not in plan.measured["seconds"]
    assert plan.estimates is not None
    assert "quantize-weights" in [stage["name"] for stage in plan.estimates["stages"]]


def test_more_bits_are_expected_to_lose_less() -> None:
    low, high = measured(bit_budget=3).assignment, measured(bit_budget=5).assignment
    assert low is not None and high is not None
    assert high["expected_loss"] < low["expected_loss"]


def test_its_file_is_the_same_twice_and_holds_no_seconds(tmp_path: Path) -> None:
    files = [write_plan(measured().file_data(), tmp_path / name) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    data = read_plan(files[0])
    assert "seconds" not in data["measured"]
    assert data["measured"]["stored_bits"] <= 3.5


def test_the_papers_preset_is_measured_without_data() -> None:
    plan = measured(preset="lowra", bit_budget=2.5)
    assert plan.assignment is not None and plan.measured is not None
    assert plan.assignment["unit"] == "squared weight error"
    assert plan.measured["calibration_tokens"] == 0
    codes = sum(int(w) * n * s["shape"][1] for s in plan.sites for w, n in s["rows"].items())
    assert codes <= 2.5 * plan.weights
    widths = [site["row_widths"]["widths"] for site in plan.sites]
    assert {width for each in widths for width in each} <= {2, 4}


def test_it_touches_nothing() -> None:
    model = one_layer_llama().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lowra.plan(model, measure=True, **LLAMA)
    assert model.training and "lowra" not in model.__dict__
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_compile_in_the_same_work_dir_fits_nothing_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = measured(work_dir=tmp_path)

    def forbidden(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr("lowra.passes.collect_statistics._write", forbidden)
    monkeypatch.setattr("lowra.passes.fit_codebooks.FitCodebooks._fit", forbidden)
    replayed = compiled(plan=plan.to_dict(), work_dir=tmp_path)
    assert replayed.lowra.plan["sites"][0]["row_widths"] == plan.sites[0]["row_widths"]


def test_a_model_given_by_name_is_loaded(tmp_path: Path) -> None:
    one_layer_llama().save_pretrained(tmp_path)
    plan = lowra.plan(tmp_path, measure=True, **LLAMA)
    assert plan.fingerprint and plan.measured is not None
    assert plan.measured["stored_bits"] <= 3
    for site in plan.sites:
        assert set(site["rows"]) == {str(w) for w in site["row_widths"]["widths"]}


@pytest.mark.parametrize(
    "given", [{"calibration": "text"}, {"tokenizer": len}, {"work_dir": "w"}], ids=str
)
def test_data_for_a_plan_from_shapes_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(given))} is read where .* measure=True"):
        lowra.plan(stack(), bit_budget=3, example=(X,), **given)


def test_what_a_compile_refuses_is_refused_before_long_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("long work has begun")

    monkeypatch.setattr("lowra.passes.collect_statistics.CollectStatistics.run", forbidden)
    with pytest.raises(BudgetError, match="out of reach"):
        measured(bit_budget=0.5)
    with pytest.raises(CaptureError, match="next-token"):
        measured(tune="full", init="closed-form")
    with torch.device("meta"):
        empty = models.tiny_llama(layers=1)
    with pytest.raises(CaptureError, match="on the meta device"):
        lowra.plan(empty, measure=True, **LLAMA)


def test_widths_of_the_file_decode_to_every_row() -> None:
    from lowra.compiler.layout import Layout
    from lowra.compiler.program import Site

    for row in measured().sites:
        n, k = row["shape"]
        site = Site(row["name"], row["name"], n, k, False, torch.float32, (row["name"],))
        data = json.loads(json.dumps(row["row_widths"]))
        for trellis in (False, True):
            widths = decode_widths(data, site, Layout(trellis=trellis))
            assert widths.shape == (n,) and bool((widths > 10).any()) == trellis
