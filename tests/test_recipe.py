"""Recipe: every wrong value is refused when it is made, and a recipe is plain data."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lowra.compiler.errors import BudgetError, RecipeError
from lowra.compiler.pipeline import parse_pipeline, print_pipeline
from lowra.passes import PASSES
from lowra.recipe import Recipe


def text(**options: Any) -> str:
    return print_pipeline(Recipe(**options).passes())


# --- what is refused ----------------------------------------------------------------------------


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


def test_a_recipe_takes_keywords_only_and_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        Recipe(2)  # pyright: ignore
    recipe = Recipe(bit_budget=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rank = 8  # pyright: ignore


# --- plain data ---------------------------------------------------------------------------------

FULL = Recipe(
    bit_budget=2.25,
    widths=(4, 2, 2, 1),
    unit="layer",
    rotation=False,
    group=64,
    shared_codebooks=False,
    scale_bits=4,
    codebook_bits=8,
    rank=8,
    alpha=12.5,
    init="loftq",
    count_adapters=True,
    correction_rank=4,
    correction_bits=8,
    include="lm_head",
    ignore=["*.down_proj", "re:layers\\.0\\."],  # pyright: ignore
    pins={"*.v_proj": 4},
    tune_steps=5,
    tune_model_steps=6,
    tune_batch_tokens=128,
    calibration_tokens=1024,
    context=64,
    seed=7,
)


@pytest.mark.parametrize(
    "recipe", [Recipe(bit_budget=2), Recipe(bit_budget=1.5, preset="lowra"), FULL]
)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_to_dict_names_every_field() -> None:
    assert set(FULL.to_dict()) == {field.name for field in dataclasses.fields(Recipe)}


def test_values_are_brought_into_one_form() -> None:
    assert FULL.widths == (1, 2, 4)
    assert FULL.include == ("lm_head",)
    assert FULL.ignore == ("*.down_proj", "re:layers\\.0\\.")


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no field 'bit_buget'; nearest: bit_budget"):
        Recipe.from_dict({"bit_buget": 2})
    with pytest.raises(RecipeError, match="no field 'ignores'; nearest: ignore"):
        Recipe.from_dict({"bit_budget": 2, "ignores": ()})


def test_a_recipe_without_a_budget_is_refused() -> None:
    with pytest.raises(RecipeError, match="a recipe needs bit_budget"):
        Recipe.from_dict({"rank": 4})


# --- what it stands for -------------------------------------------------------------------------


def test_the_default_pipeline_as_text() -> None:
    assert text(bit_budget=1.5) == (
        "normalize-linears collect-statistics measure-sensitivity rotate-inputs{rule=measured} "
        "fit-codebooks{widths=1,1.6,2,3,4 scale_bits=8 trellis=true} "
        "assign-precision{budget=1.5} compare-uniform{budget=1.5} quantize-weights{prefix=0.3} "
        "initialize-adapters rewrite-linears"
    )


def test_trellis_codes_are_the_default_where_codebooks_are_shared() -> None:
    assert (
        Recipe(bit_budget=2).layout.trellis
        and not Recipe(bit_budget=2, trellis=False).layout.trellis
    )
    for plain in ({"shared_codebooks": False}, {"group": 0}, {"preset": "lowra"}):
        recipe = Recipe(**{"bit_budget": 2, **plain})
        assert not recipe.layout.trellis and "trellis" not in print_pipeline(recipe.passes())
        with pytest.raises(RecipeError, match="trellis"):
            Recipe(**{"bit_budget": 2, "trellis": True, **plain})
    with pytest.raises(RecipeError, match="trellis=False fixes what layouts= chooses"):
        Recipe(bit_budget=2, trellis=False, layouts="auto")


def test_layouts_to_choose_from_are_all_fitted_and_chosen_with_the_budget() -> None:
    assert text(bit_budget=1.5, layouts=("64x4-shared16", "none-own8"), pins={"*.q_proj": 2}) == (
        "normalize-linears collect-statistics measure-sensitivity "
        "rotate-inputs{rule=measured group=64} "
        "fit-codebooks{widths=1,1.6,2,3,4 group=64 scale_bits=4 layouts=64x4-shared16,none-own8} "
        "choose-layouts{budget=1.5 pins=*.q_proj=2} assign-precision{budget=1.5 pins=*.q_proj=2} "
        "quantize-weights{prefix=0.3} initialize-adapters rewrite-linears"
    )
    passes = Recipe(bit_budget=1.5, layouts="auto", count_adapters=True, rank=4).passes()
    assert parse_pipeline(print_pipeline(passes), PASSES) == passes
    assert "choose-layouts{budget=1.5 adapter_rank=4}" in print_pipeline(passes)


def test_one_layout_is_no_choice_and_the_automatic_list_begins_with_the_default() -> None:
    for layout, trellis in (("64x4-shared16", False), ("64x4-shared16-trellis", True)):
        one = text(bit_budget=2, layouts=layout)
        assert one == text(bit_budget=2, group=64, scale_bits=4, trellis=trellis)
    auto = Recipe(bit_budget=2, layouts="auto")
    assert auto.layout == Recipe(bit_budget=2).layout and len(auto.candidate_layouts) > 1
    assert auto == Recipe.from_dict(json.loads(json.dumps(auto.to_dict())))
    replayed = print_pipeline(auto.passes(replay=True))
    assert "choose-layouts" not in replayed and "replay-precision" in replayed


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


def test_the_pipeline_of_the_paper_as_text() -> None:
    assert text(bit_budget=1.5, preset="lowra") == (
        "normalize-linears collect-statistics rotate-inputs{rule=never} "
        "fit-codebooks{widths=1,2,4 group=64 shared=false rule=paper} "
        "assign-precision{budget=1.5 rule=paper} quantize-weights{feedback=false} "
        "initialize-adapters{rule=loftq} rewrite-linears"
    )


def test_every_option_arrives_in_the_pipeline() -> None:
    assert print_pipeline(FULL.passes()) == (
        "normalize-linears{include=lm_head ignore=*.down_proj,re:layers\\.0\\.} "
        "collect-statistics measure-sensitivity rotate-inputs{seed=7 rule=never} "
        "fit-codebooks{widths=1,2,4 group=64 shared=false scale_bits=4 codebook_bits=8} "
        "assign-precision{budget=2.25 unit=layer pins=*.v_proj=4 adapter_rank=8 "
        "correction_rank=4 correction_bits=8} "
        "quantize-weights{prefix=0.3} correct-weights{rank=4 bits=8} "
        "initialize-adapters{rank=8 alpha=12.5 rule=loftq seed=7} "
        "rewrite-linears"
    )


@pytest.mark.parametrize("preset", ["default", "lowra"])
def test_the_text_of_a_pipeline_reads_back_as_its_passes(preset: str) -> None:
    passes = Recipe(bit_budget=2.5, preset=preset, rank=8).passes()
    assert parse_pipeline(print_pipeline(passes), PASSES) == passes


def test_tuning_is_off_unless_asked_for_and_blocks_come_before_the_model() -> None:
    assert "tune" not in text(bit_budget=2)
    assert "quantize-weights{prefix=0.3} tune-blocks initialize-adapters" in text(
        bit_budget=2, tune="blocks"
    )
    assert "quantize-weights{prefix=0.3} tune-blocks tune-model rewrite-linears" in text(
        bit_budget=2, tune="full", rank=0
    )
    sizes = {"tune_steps": 5, "tune_model_steps": 6, "tune_batch_tokens": 128}
    assert (
        "tune-blocks{steps=5 batch_tokens=128 seed=7} tune-model{steps=6 batch_tokens=128 seed=7}"
    ) in text(bit_budget=2, tune="full", seed=7, **sizes)


def test_adapters_are_tuned_last_where_they_start_at_something() -> None:
    behind = "initialize-adapters tune-adapters{steps=6} rewrite-linears"
    assert behind in text(bit_budget=2, tune="full", tune_model_steps=6)
    for other in ({"tune": "blocks"}, {"rank": 0}, {"init": "zero"}):
        assert "tune-adapters" not in text(**{"bit_budget": 2, "tune": "full", **other})


@pytest.mark.parametrize(
    "other", [{"init": "alternate"}, {"init": "loftq"}, {"correction_rank": 4}]
)
def test_what_quantizes_anew_is_refused_behind_tuning(other: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="quantizes anew what tune='blocks' has tuned"):
        Recipe(bit_budget=2, tune="blocks", **other)


def test_guided_weighs_tokens_and_diagonal_statistics_do_without_a_prefix() -> None:
    passes = text(bit_budget=2, guided=2)
    assert "collect-statistics measure-sensitivity{groups=2} rotate-inputs" in passes
    assert "quantize-weights{prefix=0.3}" in passes
    passes = text(bit_budget=2, statistics="diagonal")
    assert "collect-statistics{gram=diagonal} measure-sensitivity rotate-inputs" in passes
    assert " quantize-weights initialize-adapters" in passes


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


def test_rank_zero_leaves_the_adapter_pass_out() -> None:
    assert "initialize-adapters" not in text(bit_budget=2, rank=0)
    assert "initialize-adapters" not in text(bit_budget=2, rank=0, preset="lowra")


def test_an_automatic_rank_is_counted_and_chosen_with_the_widths() -> None:
    recipe = Recipe(bit_budget=2, rank="auto")
    assert recipe.count_adapters and recipe == Recipe.from_dict(recipe.to_dict())
    passes = text(bit_budget=2, rank="auto")
    assert "assign-precision{ranks=0,4,8,16,32}" in passes
    assert "initialize-adapters{rank=32 alpha=32.0}" in passes
    with pytest.raises(RecipeError, match="is not part of preset 'lowra'"):
        Recipe(bit_budget=2, rank="auto", preset="lowra")


def test_a_replay_stands_in_for_the_assignment() -> None:
    passes = print_pipeline(Recipe(bit_budget=2.5, rank=8, count_adapters=True).passes(replay=True))
    assert " replay-precision{budget=2.5 adapter_rank=8} quantize-weights" in passes
    assert "assign-precision" not in passes


def test_alpha_is_the_rank_unless_given() -> None:
    assert "initialize-adapters{rank=8 alpha=8.0}" in text(bit_budget=2, rank=8)
    assert "initialize-adapters{rank=8}" in text(bit_budget=2, rank=8, alpha=16)


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"bit_budget": 1.5}, (1, 1.6, 2, 3, 4)),
        ({"bit_budget": 2.6}, (1, 2, 3, 4)),
        ({"bit_budget": 4.1}, (1, 2, 3, 4)),
        ({"bit_budget": 4.2}, (1, 2, 3, 4, 8)),
        ({"bit_budget": 1.99, "preset": "lowra"}, (1, 2, 4)),
        ({"bit_budget": 2, "preset": "lowra"}, (2, 4)),
        ({"bit_budget": 2, "widths": (8, 2)}, (2, 8)),
        ({"bit_budget": 2, "widths": (1, 2), "pins": {"*": 8}}, (1, 2, 8)),
        ({"bit_budget": 2, "pins": {"*": 8}}, (1, 1.6, 2, 3, 4, 8)),
        ({"bit_budget": 2, "widths": (2, 1.6, 1)}, (1, 1.6, 2)),
        ({"bit_budget": 2, "widths": (2,), "pins": {"*": 1.6}}, (1.6, 2)),
    ],
    ids=str,
)
def test_candidate_widths_follow_budget_preset_and_pins(
    options: dict[str, Any], widths: tuple[int, ...]
) -> None:
    assert Recipe(**options).candidate_widths == widths


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, (-1, True)),
        ({"preset": "lowra"}, (64, False)),
        ({"group": 0}, (0, False)),
        ({"group": 32}, (32, True)),
        ({"shared_codebooks": False}, (-1, False)),
        ({"preset": "lowra", "group": 128}, (128, False)),
    ],
    ids=str,
)
def test_the_layout_follows_preset_and_group(
    options: dict[str, Any], layout: tuple[int, bool]
) -> None:
    found = Recipe(bit_budget=2, **options).layout
    assert (found.group, found.shared) == layout


def test_only_the_paper_looks_at_no_activations() -> None:
    assert Recipe(bit_budget=2, preset="lowra").data_free
    assert not Recipe(bit_budget=2).data_free


@pytest.mark.parametrize(
    ("name", "value"), [("threshold_average", "channels"), ("loftq_mappings", "relearned")]
)
def test_readings_of_the_paper_belong_to_its_preset(name: str, value: str) -> None:
    steps = str(Recipe(bit_budget=2.0, preset="lowra", **{name: value}).passes())
    assert steps != str(Recipe(bit_budget=2.0, preset="lowra").passes())
    with pytest.raises(RecipeError, match=f"{name}='{value}' needs preset='lowra'"):
        Recipe(bit_budget=2.0, **{name: value})
    with pytest.raises(RecipeError, match=f"{name}='other' is unknown"):
        Recipe(bit_budget=2.0, preset="lowra", **{name: "other"})
