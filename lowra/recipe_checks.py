"""What a value of a recipe may be; each raises a RecipeError that says what is wrong."""

from __future__ import annotations

import math
from typing import Any

from lowra.compiler.errors import BudgetError, RecipeError, nearest


def check_budget(budget: Any) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        kind = type(budget).__name__
        raise RecipeError(f"bit_budget={budget!r} is a {kind}; give a number such as 1.5")
    if not math.isfinite(budget) or budget <= 0:
        raise BudgetError(
            f"bit_budget={budget!r} is not a positive number of bits per weight; "
            "lowra reaches about 1.1 to 8"
        )


def is_positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{name}={value!r} is unknown; {nearest(str(value), choices)}")


def check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"{name}={value!r} must be a whole number of {least} or more")


def patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
        raise RecipeError(f"{name}={value!r} must be patterns, as strings")
    return tuple(value)
