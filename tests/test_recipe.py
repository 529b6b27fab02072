"""A recipe is plain data, and settles what is left open."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lowra.compiler.errors import RecipeError
from lowra.compiler.pipeline import print_pipeline
from lowra.recipe import Recipe

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


def test_a_recipe_takes_keywords_only_and_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        Recipe(2)  # pyright: ignore
    recipe = Recipe(bit_budget=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rank = 8  # pyright: ignore


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
