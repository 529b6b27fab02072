"""Pins: who wins, what groups make of them, and what they cost."""

from __future__ import annotations

import pytest
import torch

from lowra.compiler.errors import RecipeError
from lowra.compiler.program import Site
from lowra.passes.budget.pins import bill_of_pins, parse_pins, pinned_widths

SITES = [
    Site(name, f"{name}.weight", 4, 8, False, torch.float32, (name,)) for name in ("q", "k", "o")
]
GROUPS = [SITES[:2], SITES[2:]]


def test_pins_are_read_against_the_widths_of_the_recipe() -> None:
    assert parse_pins(("a=b=1.6", "c=4"), (1.6, 4)) == (("a=b", 1.6), ("c", 4))
    with pytest.raises(RecipeError, match=r"pin 'c=3': the width must be one of \(1, 4\)"):
        parse_pins(("c=3",), (1, 4))


def test_the_first_pin_that_matches_wins() -> None:
    assert pinned_widths(SITES, [], (("q", 2), ("*", 4))) == {
        "q": ("q", 2), "k": ("*", 4), "o": ("*", 4),
    }  # fmt: skip


def test_a_pin_holds_for_the_whole_group() -> None:
    assert pinned_widths(SITES, GROUPS, (("q", 2),)) == {"q": ("q", 2), "k": ("q", 2)}


def test_a_group_that_is_pinned_apart_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"one width to q, k, but pins.*q q=2, k k=4"):
        pinned_widths(SITES, GROUPS, (("q", 2), ("k", 4)))


def test_the_bill_says_what_each_pin_takes() -> None:
    pinned = pinned_widths(SITES, [], (("q", 2), ("*", 4)))
    text = bill_of_pins(SITES, pinned, lambda site, width: site.weights * width)
    assert "the pin q=2 takes 0.667 bits per weight of the model (1 sites)" in text
    assert "the pin *=4 takes 2.667 bits per weight of the model (2 sites)" in text
    assert bill_of_pins(SITES, {}, lambda site, width: 0) == ""
