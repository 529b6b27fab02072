"""Every wrong value of a recipe, alone or beside another, is refused when it is made."""

from __future__ import annotations

from typing import Any

import pytest

from lowra.compiler.errors import BudgetError, RecipeError
from lowra.recipe import Recipe


@pytest.mark.parametrize("budget", ["1.5", True, None, [2], 2 + 0j])
def test_a_budget_that_is_no_number_is_refused_with_its_type(budget: Any) -> None:
    with pytest.raises(RecipeError, match=f"is a {type(budget).__name__}; give a number") as caught:
        Recipe(bit_budget=budget)
    assert not isinstance(caught.value, BudgetError)


@pytest.mark.parametrize("budget", [0, -1, -0.5, float("nan"), float("inf"), float("-inf")])
def test_a_budget_that_no_model_can_meet_is_refused_with_what_is_usual(budget: float) -> None:
    with pytest.raises(BudgetError, match="not a positive number of bits.*about 1.1 to 8"):
        Recipe(bit_budget=budget)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("preset", "defalt", "preset='defalt' is unknown; nearest: default"),
        ("preset", None, "preset=None is unknown; nearest: default, lowra"),
        ("unit", "rows", "unit='rows' is unknown; nearest: row"),
        ("unit", "site", "unit='site' is unknown; nearest: "),
        ("init", "loft", "init='loft' is unknown; nearest: loftq"),
        ("init", "closed_form", "init='closed_form' is unknown; nearest: closed-form"),
        ("tune", "ful", "tune='ful' is unknown; nearest: full"),
        ("tune", True, "tune=True is unknown; nearest: "),
        ("guided", 3, "guided=3 is not one of 0, 1, 2, 4"),
        ("guided", True, "guided=True is not one of 0, 1, 2, 4"),
        ("statistics", "diag", "statistics='diag' is unknown; nearest: diagonal"),
        ("tune_steps", 0, "tune_steps=0 must be a whole number of 1 or more"),
        ("tune_model_steps", 1.5, "tune_model_steps=1.5 must be a whole number of 1 or more"),
        ("tune_batch_tokens", "1k", "tune_batch_tokens='1k' must be a whole number of 1 or more"),
        ("rank", -1, "rank=-1 must be a whole number of 0 or more"),
        ("rank", "all", "rank='all' must be a whole number of 0 or more, or 'auto'"),
        ("rank", 1.0, "rank=1.0 must be a whole number of 0 or more"),
        ("rank", True, "rank=True must be a whole number of 0 or more"),
        ("rank", None, "rank=None must be a whole number of 0 or more"),
        ("seed", -1, "seed=-1 must be a whole number of 0 or more"),
        ("seed", "0", "seed='0' must be a whole number of 0 or more"),
        ("calibration_tokens", 0, "calibration_tokens=0 must be a whole number of 1 or more"),
        ("context", 0, "context=0 must be a whole number of 1 or more"),
        ("context", 1e3, "context=1000.0 must be a whole number of 1 or more"),
        ("widths", (5,), "width 5 is not one of 1, 1.6, 2, 3, 4, 8"),
        ("widths", (0, 1), "width 0 is not one of 1, 1.6, 2, 3, 4, 8"),
        ("widths", ("2",), "width '2' is not one of 1, 1.6, 2, 3, 4, 8"),
        ("widths", (), "widths is empty; name at least one"),
        ("widths", 3, "widths=3 must be a tuple"),
        ("pins", {"*": 16}, "width 16 is not one of 1, 1.6, 2, 3, 4, 8"),
        ("pins", {"*": "4"}, "width '4' is not one of 1, 1.6, 2, 3, 4, 8"),
        ("pins", [("*", 4)], "must map patterns to widths"),
        ("group", -2, "group=-2 must be -1 .per row., 0 .none. or positive"),
        ("group", 64.0, "group=64.0 must be -1 .per row., 0 .none. or positive"),
        ("scale_bits", 2, "scale_bits=2 is not one of 4, 8, 16"),
        ("scale_bits", 8.0, "scale_bits=8.0 is not one of 4, 8, 16"),
        ("codebook_bits", 4, "codebook_bits=4 is not one of 8, 16"),
        ("group", "64", "group='64' must be -1 .per row., 0 .none. or positive"),
        ("include", 5, "include=5 must be patterns, as strings"),
        ("include", (1,), r"include=\(1,\) must be patterns, as strings"),
        ("ignore", ["a", None], r"ignore=\['a', None\] must be patterns, as strings"),
        ("rotation", "yes", "rotation='yes' must be true or false"),
        ("shared_codebooks", "no", "shared_codebooks='no' must be true or false"),
        ("count_adapters", "no", "count_adapters='no' must be true or false"),
        ("correction_rank", -1, "correction_rank=-1 must be a whole number of 0 or more"),
        ("correction_rank", 2.0, "correction_rank=2.0 must be a whole number of 0 or more"),
        ("correction_bits", 3, "correction_bits=3 must be 4 or 8"),
        ("correction_bits", "4", "correction_bits='4' must be 4 or 8"),
        ("alpha", "16", "alpha='16' must be a positive number"),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(**{"bit_budget": 2, field: value})


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), True])
def test_an_alpha_that_gives_no_scaling_is_refused(alpha: Any) -> None:
    with pytest.raises(RecipeError, match="alpha"):
        Recipe(bit_budget=2, alpha=alpha)


@pytest.mark.parametrize(
    "options",
    [{"widths": (True,)}, {"widths": (2.0,)}, {"group": True}, {"pins": {3: 2}}, {"rotation": 1}],
    ids=str,
)
def test_a_value_that_equals_a_legal_one_but_is_of_another_type_is_refused(
    options: dict[str, Any],
) -> None:
    with pytest.raises(RecipeError):
        Recipe(bit_budget=2, **options)


def test_a_seed_that_no_op_can_carry_is_refused() -> None:
    with pytest.raises(RecipeError, match="seed"):
        Recipe(bit_budget=2, seed=2**63)


def test_shared_codebooks_without_scales_are_refused() -> None:
    with pytest.raises(RecipeError, match="shared_codebooks needs scales: use group=-1"):
        Recipe(bit_budget=2, shared_codebooks=True, group=0)


@pytest.mark.parametrize(
    "options",
    [
        {"unit": "layer"},
        {"pins": {"*": 4}},
        {"group": 0},
        {"shared_codebooks": True},
        {"count_adapters": True},
        {"correction_rank": 4},
        {"tune": "blocks"},
        {"tune": "full"},
    ],
    ids=str,
)
def test_what_the_paper_does_not_have_is_refused_in_its_preset(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="preset 'lowra'.*use preset 'default'"):
        Recipe(bit_budget=2, preset="lowra", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layouts": ("row8",)}, "layout 'row8' is none: write row8-shared16"),
        ({"layouts": "row3-shared16"}, "scales of 3 bits, not 4, 8, 16"),
        ({"layouts": "row8-own4"}, "codebook values of 4 bits, not 8, 16"),
        ({"layouts": "none-shared16"}, "shared codebooks need scales"),
        ({"layouts": "0x8-shared16"}, "shared codebooks need scales"),
        ({"layouts": ()}, "layouts is empty"),
        ({"layouts": 5}, "layouts=5 must be patterns, as strings"),
        ({"layouts": "auto", "group": 64}, "group=64 fixes what layouts= chooses"),
        ({"layouts": "auto", "scale_bits": 8}, "scale_bits=8 fixes what layouts= chooses"),
        ({"layouts": "auto", "rank": "auto"}, "rank='auto' and layouts are both chosen"),
        ({"layouts": "auto", "preset": "lowra"}, "layouts='auto' is not part of preset 'lowra'"),
    ],
    ids=str,
)
def test_layouts_that_cannot_be_stored_or_stand_beside_another_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(bit_budget=2, **options)


@pytest.mark.parametrize(
    "other", [{"init": "alternate"}, {"init": "loftq"}, {"correction_rank": 4}]
)
def test_what_quantizes_anew_is_refused_behind_tuning(other: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="quantizes anew what tune='blocks' has tuned"):
        Recipe(bit_budget=2, tune="blocks", **other)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"init": "alternate"}, "init='alternate' quantizes anew, in the plain metric"),
        ({"correction_rank": 4}, "correction_rank=4 quantizes anew, in the plain metric"),
        ({"statistics": "diagonal"}, "guided=1 needs statistics='full'"),
        ({"preset": "lowra"}, "guided=1 is not part of preset 'lowra'"),
    ],
    ids=str,
)
def test_what_guided_cannot_go_with_is_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(bit_budget=2, guided=1, **other)


def test_the_paper_collects_nothing_diagonal() -> None:
    with pytest.raises(RecipeError, match="statistics='diagonal' is not part of preset 'lowra'"):
        Recipe(bit_budget=2, preset="lowra", statistics="diagonal")
