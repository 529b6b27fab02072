"""A layout's text says it all, and its bits are those of the storage format."""

from __future__ import annotations

from typing import Any

import pytest

from lowra.compiler.compact import Compact
from lowra.compiler.errors import RecipeError
from lowra.compiler.layout import OLD_AUTO, Layout, with_plain_codes
from lowra.compiler.stored_bits import row_bits, site_bits
from lowra.recipe import Recipe

LAYOUTS = [
    ("row8-shared16", Layout(-1, True, Compact(8, 16))),
    ("row16-own16", Layout(-1, False)),
    ("64x4-shared16", Layout(64, True, Compact(4, 16))),
    ("128x8-own8", Layout(128, False, Compact(8, 8))),
    ("none-own8", Layout(0, False, Compact(16, 8))),
    ("row8-shared16-trellis", Layout(-1, True, Compact(8, 16), True)),
]


@pytest.mark.parametrize(("text", "layout"), LAYOUTS)
def test_a_layout_reads_back_from_its_text(text: str, layout: Layout) -> None:
    assert Layout.parse(text) == layout and str(layout) == text


@pytest.mark.parametrize(("text", "layout"), LAYOUTS)
def test_its_bits_are_those_of_the_format(text: str, layout: Layout) -> None:
    group, shared, compact = layout.group, layout.shared, layout.compact
    ids = {1: 11, 1.6: 9, 4: 4} if layout.trellis else {1: 1, 1.6: 9, 4: 4}
    for width, id in ids.items():
        assert layout.width_id(width) == id
        assert layout.row_bits(576, width) == row_bits(576, id, group, shared, compact)
    site = layout.site_bits(7, 576, (1, 4))
    assert site == site_bits(7, (ids[1], 4), shared, compact, group, 576)


@pytest.mark.parametrize(
    ("layouts", "now"),
    [(None, None), ("auto", [*OLD_AUTO]), (["64x4-own8"], ["64x4-own8"])],
    ids=str,
)
def test_a_recipe_from_before_trellis_codes_means_what_it_did(layouts: Any, now: Any) -> None:
    old = Recipe(bit_budget=2, layouts=layouts).to_dict()
    del old["trellis"]
    recipe = Recipe.from_dict(with_plain_codes(old))
    assert not any(layout.trellis for layout in recipe.candidate_layouts)
    assert recipe.to_dict()["layouts"] == now


@pytest.mark.parametrize(
    "text", ["", "row", "row8", "row8-shared", "none8-own8", "-1x8-shared16", "64-shared16",
             "none-shared16", "row8-own8-trellis", "row8-shared4", "row7-own8",
             "0x4-shared16", "99999x4-own8"],
)  # fmt: skip
def test_what_is_no_layout_is_refused_by_its_text(text: str) -> None:
    with pytest.raises(RecipeError, match=f"layout '{text}'"):
        Layout.parse(text)
