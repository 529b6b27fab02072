"""plan: it touches nothing, and the interval it names holds."""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowra
from lowra.compiler.errors import BudgetError, PatternError
from lowra.workflows.planning import Plan
from tests import models
from tests.runtime.compiled_models import compiled_stack, remembered_capture, stack

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowra.api.capture", remembered_capture)


def plan_of(**options: Any) -> Plan:
    return lowra.plan(stack(), example=(X,), **({"bit_budget": 3.5} | options))


def compile_stack(**options: Any) -> Any:
    return lowra.compile(stack(), example=(X,), **({"rank": 2} | options))


def stored(compiled: Any) -> float:
    return compiled.lowra.report["totals"]["stored_bits"]


@functools.cache
def plan_of_llama() -> Plan:
    return lowra.plan(models.tiny_llama(layers=1), bit_budget=2)


def test_plan_touches_nothing() -> None:
    model = models.plain_mlp().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    lowra.plan(model, bit_budget=20, example=tuple(models.tokens(model).values()))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert "lowra" not in model.__dict__
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_plan_and_refusals_run_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the trace, nothing computes: no statistics, no text written by the model."""

    def forbidden(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("long work has begun")

    monkeypatch.setattr("lowra.passes.collect_statistics.CollectStatistics.run", forbidden)
    monkeypatch.setattr("lowra.workflows.calibration_batches.generate_calibration", forbidden)
    assert plan_of().bit_budget == 3.5
    with pytest.raises(BudgetError):
        compile_stack(bit_budget=0.5)


def test_a_plan_lists_every_site_and_everything_skipped_with_the_reason() -> None:
    plan = plan_of_llama()
    assert [site["name"].rsplit(".", 1)[-1] for site in plan.sites] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert plan.sites[0] == {"name": "model.layers.0.self_attn.q_proj", "shape": [64, 64]}
    assert {s["name"]: s["reason"] for s in plan.skipped} == {
        "model.embed_tokens.weight": "embedding, kept in 16 bit",
        "lm_head.weight": "output head, kept in 16 bit; include it to compress it",
    }


def test_a_plan_counts_weights_and_bytes() -> None:
    plan = plan_of(rank=4)
    weights = 64 * 64 + 96 * 64 + 32 * 96
    assert plan.weights == weights
    assert plan.dense_bytes == 4 * weights
    assert plan.largest_bytes == math.floor(3.5 * weights / 8)
    assert plan.adapter_bytes == 2 * 4 * (64 + 64 + 96 + 64 + 32 + 96)
    assert plan.counts == "stored bits"


def test_a_plan_is_json_and_names_its_pipeline() -> None:
    plan = plan_of()
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["pipeline"].startswith("normalize-linears collect-statistics")
    assert data["pipeline"].endswith("rewrite-linears")
    assert set(data) == set(Plan.__dataclass_fields__)
    assert data["sites"] == [dict(site) for site in plan.sites]


def test_the_plan_of_a_compiled_model_says_which_rows_got_which_width() -> None:
    compiled: Any = compiled_stack().compiled
    shapes = {"first": 64, "middle": 96, "last": 32}
    for site in json.loads(json.dumps(compiled.lowra.plan))["sites"]:
        assert sum(site["rows"].values()) == shapes[site["name"]]


# --- the interval -------------------------------------------------------------------------------


def test_the_lowest_budget_can_be_met_and_less_is_refused_with_the_interval() -> None:
    lowest = plan_of().lowest_bits
    assert stored(compile_stack(bit_budget=lowest + 1e-6)) <= lowest + 1e-6
    with pytest.raises(BudgetError, match=f"can be stored in {math.ceil(lowest * 1e3) / 1e3:.3f}"):
        compile_stack(bit_budget=lowest - 1e-3)


def test_the_lowest_budget_of_a_language_model_can_be_met() -> None:
    lowest = plan_of_llama().lowest_bits
    compiled = lowra.compile(
        models.tiny_llama(layers=1),
        bit_budget=lowest + 1e-6,
        calibration_tokens=128,
        context=32,
        rank=2,
    )
    assert stored(compiled) <= lowest + 1e-6


def test_a_budget_beyond_the_highest_is_met_with_what_there_is() -> None:
    highest = plan_of(bit_budget=100).highest_bits
    assert stored(compile_stack(bit_budget=100)) <= highest + 1e-9


@pytest.mark.parametrize(
    "share",
    [0.02, 0.1, 0.2, 0.3, 0.6, 1.0],
)
def test_every_budget_within_the_interval_can_be_met(share: float) -> None:
    """The interval is that of the smallest budget; a plain module has the most overhead."""
    model = models.plain_mlp()
    example = tuple(models.tokens(model).values())
    ends = lowra.plan(model, bit_budget=100, example=example)
    lowest = lowra.plan(model, bit_budget=4, example=example).lowest_bits
    budget = lowest + share * (ends.highest_bits - lowest)
    compiled = lowra.compile(model, bit_budget=budget, rank=2, example=example)
    assert stored(compiled) <= budget


@pytest.mark.parametrize(
    "options",
    [
        {"widths": (2, 4)},
        {"widths": (3,)},
        {"group": 16},
        {"group": 0},
        {"shared_codebooks": False},
        {"pins": {"first": 4}},
        {"pins": {"*": 2}},
        {"count_adapters": True},
        {"unit": "layer"},
    ],
    ids=str,
)
def test_the_lowest_budget_can_be_met_whatever_the_layout(options: dict[str, Any]) -> None:
    lowest = plan_of(bit_budget=100, rank=2, **options).lowest_bits
    within = {"bit_budget": lowest + 1e-6, "rank": 2, **options}
    lowest = plan_of(**({**within, "bit_budget": 100} if lowest > 4.1 else within)).lowest_bits
    compiled = compile_stack(**{**within, "bit_budget": lowest + 1e-6})
    counted = stored(compiled)
    if options.get("count_adapters"):
        counted += compiled.lowra.report["totals"]["adapter_bits"]
    assert counted <= lowest + 1e-6


@pytest.mark.parametrize("unit", ["row", "siblings"])
def test_layouts_to_choose_from_widen_the_interval_and_its_end_can_be_met(unit: str) -> None:
    layouts = ("64x4-shared16", "row4-shared16", "none-own8")
    single = [plan_of(layouts=one, unit=unit, bit_budget=8) for one in layouts]
    every = plan_of(layouts=layouts, unit=unit, bit_budget=8)
    assert every.lowest_bits <= min(plan.lowest_bits for plan in single)
    assert every.highest_bits >= max(plan.highest_bits for plan in single)
    lowest = every.lowest_bits
    compiled = compile_stack(bit_budget=lowest + 1e-6, layouts=layouts, unit=unit)
    assert stored(compiled) <= lowest + 1e-6
    with pytest.raises(BudgetError, match=f"can be stored in {lowest:.3f} to"):
        compile_stack(bit_budget=lowest - 0.002, layouts=layouts, unit=unit)


def test_the_paper_counts_codes_alone() -> None:
    plan = plan_of(bit_budget=2.5, preset="lowra")
    assert plan.counts == "code bits"
    assert (plan.lowest_bits, plan.highest_bits) == (2.0, 4.0)
    assert plan_of(bit_budget=1.5, preset="lowra").lowest_bits == 1.0


def test_a_refusal_names_pins_and_an_interval_that_is_one() -> None:
    with pytest.raises(BudgetError, match=r"with pins \{'\*': 8\}.*stored in ") as caught:
        plan_of(bit_budget=2, pins={"*": 8})
    low, high = (float(word) for word in str(caught.value).rsplit("stored in ")[1].split()[:3:2])
    assert low <= high + 1e-3


def test_an_interval_of_one_point_is_not_printed_upside_down() -> None:
    model = models.plain_mlp()
    with pytest.raises(BudgetError) as caught:
        lowra.plan(model, bit_budget=9, widths=(8,), example=tuple(models.tokens(model).values()))
    low, high = (float(word) for word in str(caught.value).rsplit("stored in ")[1].split()[:3:2])
    assert low <= high


def test_a_pin_that_matches_nothing_is_refused_with_the_nearest() -> None:
    with pytest.raises(PatternError, match="pins='frist' matches no weight; nearest: first"):
        plan_of(pins={"frist": 4})


def test_pins_that_overlap_have_one_winner() -> None:
    """plan and compile must agree on it."""
    compiled = compile_stack(bit_budget=100, pins={"first": 2, "*": 4})
    rows = {s["name"]: s["rows"] for s in compiled.lowra.report["sites"]}
    assert rows == {"first": {"2": 64}, "middle": {"4": 96}, "last": {"4": 32}}


def test_a_module_without_an_example_is_planned_from_its_tree() -> None:
    plan = lowra.plan(stack(), bit_budget=3.5)
    assert [site["name"] for site in plan.sites] == ["first", "middle", "last"]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(4, 4, 3)
        self.used = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 32)
        self.table = nn.Embedding(5, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_each_kind_of_skipped_weight_has_its_reason() -> None:
    plan = lowra.plan(Mixed(), bit_budget=20, example=(torch.zeros(2, 32),))
    assert [site["name"] for site in plan.sites] == ["used"]
    assert {s["name"]: s["reason"] for s in plan.skipped} == {
        "convolution.weight": "a tensor of 3 axes (experts, convolution), not one linear",
        "unused.weight": "no linear of the traced graph reads it",
        "table.weight": "embedding, kept in 16 bit",
    }
