"""The passes that a recipe stands for, as text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lowra.compiler.errors import RecipeError
from lowra.compiler.pipeline import parse_pipeline, print_pipeline
from lowra.passes import PASSES
from lowra.recipe import Recipe
from tests.test_recipe import FULL


def text(**options: Any) -> str:
    return print_pipeline(Recipe(**options).passes())


def test_the_default_pipeline_as_text() -> None:
    assert text(bit_budget=1.5) == (
        "normalize-linears collect-statistics measure-sensitivity rotate-inputs{rule=measured} "
        "fit-codebooks{widths=1,1.6,2,3,4 scale_bits=8 trellis=true} "
        "assign-precision{budget=1.5} compare-uniform{budget=1.5} quantize-weights{prefix=0.3} "
        "initialize-adapters rewrite-linears"
    )


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


def test_guided_weighs_tokens_and_diagonal_statistics_do_without_a_prefix() -> None:
    passes = text(bit_budget=2, guided=2)
    assert "collect-statistics measure-sensitivity{groups=2} rotate-inputs" in passes
    assert "quantize-weights{prefix=0.3}" in passes
    passes = text(bit_budget=2, statistics="diagonal")
    assert "collect-statistics{gram=diagonal} measure-sensitivity rotate-inputs" in passes
    assert " quantize-weights initialize-adapters" in passes


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
    ("name", "value"), [("threshold_average", "channels"), ("loftq_mappings", "relearned")]
)
def test_readings_of_the_paper_belong_to_its_preset(name: str, value: str) -> None:
    steps = str(Recipe(bit_budget=2.0, preset="lowra", **{name: value}).passes())
    assert steps != str(Recipe(bit_budget=2.0, preset="lowra").passes())
    with pytest.raises(RecipeError, match=f"{name}='{value}' needs preset='lowra'"):
        Recipe(bit_budget=2.0, **{name: value})
    with pytest.raises(RecipeError, match=f"{name}='other' is unknown"):
        Recipe(bit_budget=2.0, preset="lowra", **{name: "other"})
