"""Adapters by pattern: which sites get one, of what rank, and how it is scaled."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import lowra
from lowra.compiler.errors import PatternError, RecipeError
from lowra.passes.budget.adapter_ranks import parse_ranks, rank_of, scaling_of
from lowra.recipe import Recipe
from lowra.runtime.module_view import quantized_linears
from tests.runtime.compiled_models import stack


def layers(**options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    example = (torch.randn(2, 64),)
    model = lowra.compile(stack(), bit_budget=4, calibration=[example], example=example, **options)
    return cast("dict[str, Any]", quantized_linears(model))


def test_the_first_pattern_that_matches_gives_the_rank_and_targets_come_first() -> None:
    patterns = (("*.q_proj", 8), ("*.?_proj", 4))
    assert rank_of("layers.0.q_proj", 16, (), patterns) == 8
    assert rank_of("layers.0.k_proj", 16, (), patterns) == 4
    assert rank_of("layers.0.mlp", 16, (), patterns) == 16
    assert rank_of("layers.0.q_proj", 16, ("*.mlp",), patterns) == 0


def test_scaling_is_alpha_over_rank_or_over_its_root() -> None:
    assert scaling_of(32, 16, False) == 2
    assert scaling_of(32, 16, True) == 8
    assert scaling_of(0, 16, False) == 1
    assert scaling_of(0, 16, True) == 4


@pytest.mark.parametrize("entry", ["q_proj", "=8", "q_proj=many", "q_proj=-1"])
def test_what_is_no_rank_pattern_is_refused(entry: str) -> None:
    with pytest.raises(RecipeError, match="PATTERN=RANK"):
        parse_ranks((entry,))


def test_targets_and_patterns_give_every_layer_its_rank_and_scaling() -> None:
    found = layers(rank=4, alpha=8, targets=("first", "last"), rank_pattern={"last": 2})
    assert {name: layer.rank for name, layer in found.items()} == {
        "first": 4, "middle": 0, "last": 2,
    }  # fmt: skip
    assert (found["first"].scaling, found["last"].scaling) == (2, 4)


def test_without_alpha_every_rank_scales_by_one_and_rslora_by_its_root() -> None:
    found = layers(rank=0, rank_pattern={"last": 2, "first": 4})
    assert [found[name].scaling for name in ("first", "last")] == [1, 1]
    assert found["middle"].rank == 0
    found = layers(rank=9, rslora=True)
    assert found["first"].scaling == 3


def test_rslora_changes_the_factors_and_not_the_product_they_start_with() -> None:
    plain, rooted = layers(rank=4), layers(rank=4, rslora=True)
    for name, layer in plain.items():
        other = rooted[name]
        assert not torch.equal(layer.lora_A, other.lora_A)
        torch.testing.assert_close(
            layer.scaling * layer.lora_B @ layer.lora_A,
            other.scaling * other.lora_B @ other.lora_A,
        )


@pytest.mark.parametrize("options", [{"targets": "frist"}, {"rank_pattern": {"frist": 2}}])
def test_a_pattern_that_matches_nothing_is_an_error_that_names_the_nearest(
    options: dict[str, Any],
) -> None:
    with pytest.raises(PatternError, match="nearest: first"):
        layers(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank_pattern": {"a": -1}}, "rank_pattern"),
        ({"rank_pattern": {"a": 1.5}}, "rank_pattern"),
        ({"rank_pattern": ["a=1"]}, "must map patterns"),
        ({"rank_pattern": {"a": 1}, "rank": "auto"}, "rank='auto'"),
        ({"targets": ("a",), "count_adapters": True}, "count_adapters=True"),
        ({"targets": 3}, "targets=3"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": True}, "lora_dropout=True"),
        ({"rslora": "yes"}, "rslora='yes'"),
        ({"train": ("adapter",)}, "train='adapter' is unknown; nearest: adapters"),
        ({"train": ()}, "trains nothing"),
        ({"train": 3}, "train=3"),
        ({"train": ("scales",), "group": 0}, "train='scales' needs scales"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("(", r"\(")):
        Recipe(bit_budget=2, **options)


def test_a_recipe_with_patterns_goes_through_json() -> None:
    recipe = Recipe(
        bit_budget=2, targets=("*.q_proj",), rank_pattern={"*.0.*": 4}, rslora=True,
        lora_dropout=0.1, train=("adapters", "norms"),
    )  # fmt: skip
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_plan_counts_the_ranks_of_patterns() -> None:
    example = (torch.randn(2, 64),)
    options: dict[str, Any] = {"bit_budget": 4, "example": example}
    plan = lowra.plan(
        stack(), rank=4, targets=("last", "first"), rank_pattern={"last": 2}, **options
    )
    assert plan.adapter_bytes == 2 * (2 * (96 + 32) + 4 * (64 + 64))
