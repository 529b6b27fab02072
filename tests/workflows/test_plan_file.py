"""Plan files: replayed to the same bytes, refused for another model, hard to break."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowra
from lowra.compiler.errors import BudgetError, OutputError, PlanError, RecipeError
from lowra.compiler.layout import Layout
from lowra.compiler.program import Site
from lowra.workflows.plan_file import decode_widths, encode_widths, read_plan, write_plan
from tests.runtime.compiled_models import Stack, remembered_capture, stack

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowra.api.capture", remembered_capture)


def compile_stack(model: nn.Module | None = None, **options: Any) -> Any:
    return lowra.compile(stack() if model is None else model, example=(X,), **options)


def planned() -> dict[str, Any]:
    """The plan of a compile, as it would come from a file."""
    return json.loads(json.dumps(compile_stack(bit_budget=4, rank=2, seed=3).lowra.plan))


def a_site(n: int) -> Site:
    return Site("a", "a.weight", n, 8, False, torch.float32, ("a",))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([1, 1.6, 2, 3, 4, 8]), min_size=1, max_size=300), st.booleans()
)  # fmt: skip
def test_widths_survive_their_encoding(of_rows: list[float], trellis: bool) -> None:
    layout = Layout(trellis=trellis)
    widths = [*map(layout.width_id, of_rows)]
    data = json.loads(json.dumps(encode_widths(torch.tensor(widths, dtype=torch.uint8))))
    assert decode_widths(data, a_site(len(widths)), layout).tolist() == widths
    for wrong in (len(widths) - 1, len(widths) + 1):
        with pytest.raises(PlanError, match="row widths of a cannot be read"):
            decode_widths(data, a_site(wrong), layout)


def test_a_plan_names_widths_and_not_their_ids() -> None:
    for ids in ([2, 9, 1], [12, 9, 11]):
        data = encode_widths(torch.tensor(ids, dtype=torch.uint8))
        assert sorted(data["widths"]) == [1, 1.6, 2]


def test_the_widths_of_many_equal_rows_take_little_room() -> None:
    data = encode_widths(torch.full((100_000,), 2, dtype=torch.uint8))
    assert len(json.dumps(data)) < 250


@pytest.mark.parametrize(
    "change",
    [
        {"index": "!"},
        {"index": "AAAA"},
        {"widths": [999]},
        {"widths": [2, 3, 7]},
        {"widths": []},
        {"widths": None},
    ],
    ids=str,
)
def test_damaged_widths_are_refused(change: dict[str, Any]) -> None:
    data = encode_widths(torch.tensor([2, 3, 4], dtype=torch.uint8)) | change
    with pytest.raises(PlanError, match="row widths of a"):
        decode_widths(data, a_site(3), Layout())


def same_tensors(left: nn.Module, right: nn.Module) -> bool:
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def test_a_replayed_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    first = compile_stack(bit_budget=4, rank=2, seed=3)
    file = write_plan(first.lowra.plan, tmp_path / "plan.json")
    second = compile_stack(plan=file)
    assert same_tensors(first, second)
    for folder, model in (("a", first), ("b", second)):
        lowra.save(model, tmp_path / folder)
    for name in ("model.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "replay-precision{budget=4.0}" in second.lowra.report["pipeline"]
    assert second.lowra.plan["recipe"] == first.lowra.plan["recipe"]
    assert second.lowra.plan["sites"] == first.lowra.plan["sites"]


def test_ternary_rows_and_small_scales_are_replayed() -> None:
    first = compile_stack(
        bit_budget=3.2, widths=(1, 1.6, 3), group=32, scale_bits=4, codebook_bits=8, rank=2,
        pins={"first": 1.6},
    )  # fmt: skip
    plan = json.loads(json.dumps(first.lowra.plan))
    assert plan["sites"][0]["row_widths"]["widths"] == [1.6]
    second = compile_stack(plan=plan)
    assert same_tensors(first, second)
    assert second.lowra.plan["sites"] == first.lowra.plan["sites"]


CANDIDATES = ("64x4-shared16", "row8-shared16", "32x4-own8")


def test_chosen_layouts_are_replayed_to_the_same_bytes(tmp_path: Path) -> None:
    first = compile_stack(bit_budget=4, rank=2, seed=3, layouts=CANDIDATES)
    plan = read_plan(write_plan(first.lowra.plan, tmp_path / "plan.json"))
    chosen = {site["name"]: site["layout"] for site in plan["sites"]}
    report = first.lowra.report
    assert {site["name"]: site["layout"] for site in report["sites"]} == chosen
    assert sum(report["totals"]["layouts"].values()) == len(chosen)
    assert "choose-layouts{budget=4.0}" in report["pipeline"]
    second = compile_stack(plan=plan)
    assert same_tensors(first, second)
    assert "choose-layouts" not in second.lowra.report["pipeline"]
    again = json.loads(json.dumps(second.lowra.plan["sites"]))
    assert again == plan["sites"]


@pytest.mark.parametrize("layout", ["128x4-shared16", "row8", 5, None])
def test_an_edited_plan_with_a_layout_that_is_no_candidate_is_refused(layout: Any) -> None:
    plan = json.loads(json.dumps(compile_stack(bit_budget=4, layouts=CANDIDATES[:2]).lowra.plan))
    plan["sites"][1]["layout"] = layout
    with pytest.raises(PlanError, match="layout of middle is .*, not one of its recipe's"):
        compile_stack(plan=plan)
    del plan["sites"][1]["layout"]
    with pytest.raises(PlanError, match="layout of middle is None"):
        compile_stack(plan=plan)


def test_a_layout_in_the_plan_of_a_recipe_with_another_is_refused() -> None:
    plan = planned()
    plan["sites"][0]["layout"] = "64x4-shared16"
    with pytest.raises(PlanError, match="not one of its recipe's .row8-shared16."):
        compile_stack(plan=plan)


def test_a_replay_keeps_the_widths_of_other_calibration_data() -> None:
    plan = planned()
    replayed = compile_stack(plan=plan, calibration=torch.randn(8, 64))
    sites = json.loads(json.dumps(replayed.lowra.plan["sites"]))
    assert sites == plan["sites"]
    loss = replayed.lowra.report["assignment"]
    assert loss["bound"] is None and loss["expected_loss"] > 0


def test_a_replay_of_the_paper_counts_code_bits() -> None:
    first = compile_stack(bit_budget=2.5, preset="lowra", rank=2)
    assert same_tensors(first, compile_stack(plan=first.lowra.plan))


def test_a_plan_without_widths_replays_its_recipe() -> None:
    plan = lowra.plan(stack(), example=(X,), bit_budget=4, rank=2).to_dict()
    assert all("row_widths" not in site for site in plan["sites"])
    assert same_tensors(compile_stack(plan=plan), compile_stack(bit_budget=4, rank=2))


class Taller(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(96, 48)


class Longer(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Taller, r"last is \[48, 96\] here and \[32, 96\] in the plan"),
        (Longer, "it has no site extra"),
    ],
)
def test_a_plan_for_another_model_is_refused_by_the_first_site_that_differs(
    model: type[nn.Module], message: str
) -> None:
    with pytest.raises(PlanError, match=f"plan is for another model: {message}"):
        compile_stack(model(), plan=planned())


def test_a_plan_that_names_more_sites_is_refused() -> None:
    with pytest.raises(PlanError, match="this one has no site extra"):
        compile_stack(plan=lowra.plan(Longer(), bit_budget=4, example=(X,)).to_dict())


def test_a_plan_for_other_weights_is_refused() -> None:
    model = stack()
    with torch.no_grad():
        model.get_parameter("middle.weight")[0, 0] += 1
    with pytest.raises(PlanError, match="the shapes agree but the weights do not"):
        compile_stack(model, plan=planned())


def test_a_plan_beside_a_recipe_is_refused() -> None:
    with pytest.raises(RecipeError, match="leave bit_budget out, or the plan"):
        compile_stack(plan=planned(), bit_budget=2)
    with pytest.raises(RecipeError, match="leave recipe out"):
        compile_stack(plan=planned(), recipe=lowra.Recipe(bit_budget=2))


def test_an_edited_plan_does_not_break_the_budget() -> None:
    plan = planned()
    for site in plan["sites"]:
        site["row_widths"] = encode_widths(torch.full((site["shape"][0],), 4, dtype=torch.uint8))
    with pytest.raises(BudgetError, match="more than its own bit_budget=4: it was edited"):
        compile_stack(plan=plan)


def test_an_edited_plan_with_a_width_that_is_not_fitted_is_refused() -> None:
    plan = planned()
    site = plan["sites"][0]
    site["row_widths"] = encode_widths(torch.full((site["shape"][0],), 8, dtype=torch.uint8))
    with pytest.raises(PlanError, match="gives first the width 8"):
        compile_stack(plan=plan)


@pytest.mark.parametrize("lost", ["recipe", "sites"])
def test_a_plan_that_lacks_its_half_is_refused(lost: str) -> None:
    plan = copy.deepcopy(planned())
    del plan[lost]
    with pytest.raises(PlanError, match="lacks its recipe or its sites"):
        compile_stack(plan=plan)


def test_a_plan_of_version_1_is_replayed_with_plain_codes(tmp_path: Path) -> None:
    made = compile_stack(bit_budget=2, rank=0, trellis=False)
    path = write_plan(made.lowra.plan, tmp_path / "plan.json")
    data = json.loads(path.read_text())
    assert data["version"] == 2
    del data["recipe"]["trellis"]
    path.write_text(json.dumps(data | {"version": 1}))
    again = lowra.compile(stack(), plan=path, example=(X,))
    assert again.lowra.recipe["trellis"] is False
    assert again.lowra.report["totals"]["rows"] == made.lowra.report["totals"]["rows"]


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"format": "lowra-plan", "version": 99}', "\0"])
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(PlanError):
        read_plan(file)
    with pytest.raises(PlanError, match="cannot read the plan"):
        read_plan(tmp_path / "missing.json")


def test_a_plan_is_not_overwritten_unasked(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        write_plan(planned(), file)
    assert file.read_text() == "mine"
    write_plan(planned(), file, overwrite=True)
    assert read_plan(file)["recipe"]["bit_budget"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(OutputError, match="is no folder"):
        write_plan(planned(), tmp_path / "nowhere" / "plan.json")
