"""What a recipe may say: single values, and values that cannot stand beside each other.

Each check raises a RecipeError that says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lowra.compiler.compact import CODEBOOK_BITS, SCALE_BITS
from lowra.compiler.errors import BudgetError, RecipeError, nearest
from lowra.compiler.layout import Layout
from lowra.compiler.packing import TERNARY, WIDTHS
from lowra.passes.correct_weights import CORRECTION_BITS
from lowra.passes.rounding.paper_mappings import AVERAGES
from lowra.runtime.training import check_parts

if TYPE_CHECKING:
    from lowra.recipe import Recipe

PRESETS = ("default", "lowra")
RANKS = (0, 4, 8, 16, 32)
"""LoRA ranks that rank="auto" chooses from."""

UNITS = ("row", "layer", "siblings")
INITS = ("closed-form", "two-sided", "alternate", "loftq", "zero")
MAPPINGS = ("kept", "relearned")
TUNES = ("none", "blocks", "full")
GUIDED = (0, 1, 2, 4)
"""Groups of rows that each have a metric of their own."""
STATISTICS = ("full", "diagonal")
SIZES = (
    "calibration_tokens", "context", "tune_steps", "tune_model_steps", "tune_batch_tokens",
)  # fmt: skip
"""Fields that are whole numbers of one or more."""


def check_values(recipe: Recipe) -> None:
    """Every field by itself. Raises RecipeError, BudgetError for a budget that is no size."""
    check_budget(recipe.bit_budget)
    for name, choices in (
        ("preset", PRESETS), ("unit", UNITS), ("tune", TUNES), ("statistics", STATISTICS),
    ):  # fmt: skip
        check_choice(name, getattr(recipe, name), choices)
    for name, choices in (
        ("init", INITS), ("threshold_average", AVERAGES), ("loftq_mappings", MAPPINGS),
    ):  # fmt: skip
        if getattr(recipe, name) is not None:
            check_choice(name, getattr(recipe, name), choices)
    if isinstance(recipe.rank, str) and recipe.rank != "auto":
        raise RecipeError(f"rank={recipe.rank!r} must be a whole number of 0 or more, or 'auto'")
    for name in ("rank", "correction_rank", "seed", *SIZES):
        if (name, recipe.rank) != ("rank", "auto"):
            check_whole(name, getattr(recipe, name), 1 if name in SIZES else 0)
    for name in ("include", "ignore", "targets"):
        patterns(name, getattr(recipe, name))
    check_parts(patterns("train", recipe.train))
    _check_types(recipe)
    _check_adapter(recipe)
    _check_widths(recipe)
    _check_listed(recipe)
    _check_layouts(recipe.layouts)


def check_together(recipe: Recipe) -> None:
    """Fields that cannot stand beside each other. Raises RecipeError."""
    if recipe.shared_codebooks and recipe.group == 0:
        raise RecipeError("shared_codebooks needs scales: use group=-1 or a group size")
    if recipe.trellis and not (recipe.is_paper or recipe.layout.shared):
        raise RecipeError(
            "trellis codes need shared codebooks: leave out shared_codebooks=False and group=0"
        )
    if recipe.group == 0 and "scales" in recipe.train:
        raise RecipeError("train='scales' needs scales: use group=-1 or a group size")
    _check_preset(recipe)
    _check_choosing(recipe)
    _check_ranks(recipe)
    quantizing = [name for name, quantizes in _quantizing_anew(recipe).items() if quantizes]
    if quantizing and recipe.tune != "none":
        raise RecipeError(
            f"{quantizing[0]}={getattr(recipe, quantizing[0])!r} quantizes anew what "
            f"tune={recipe.tune!r} has tuned; leave one of them out"
        )
    if not recipe.guided:
        return
    if recipe.statistics != "full":
        raise RecipeError(f"guided={recipe.guided} needs statistics='full'")
    if quantizing:
        raise RecipeError(
            f"{quantizing[0]}={getattr(recipe, quantizing[0])!r} quantizes anew, in the plain "
            f"metric, what guided={recipe.guided} has quantized; leave one of them out"
        )


def _quantizing_anew(recipe: Recipe) -> dict[str, bool]:
    """Options, and whether they quantize what quantize-weights has quantized already."""
    return {
        "correction_rank": recipe.correction_rank > 0,
        "init": recipe.init in ("alternate", "loftq"),
    }


def _check_types(recipe: Recipe) -> None:
    for name in ("rotation", "shared_codebooks", "count_adapters", "rslora", "trellis"):
        if not isinstance(getattr(recipe, name), (bool, type(None))):
            raise RecipeError(f"{name}={getattr(recipe, name)!r} must be true or false")
    if recipe.alpha is not None and not is_positive(recipe.alpha):
        raise RecipeError(f"alpha={recipe.alpha!r} must be a positive number")
    if recipe.seed >= 1 << 63:
        raise RecipeError(f"seed={recipe.seed} must be below 2^63")
    if recipe.widths is not None and not isinstance(recipe.widths, (tuple, list)):
        raise RecipeError(f"widths={recipe.widths!r} must be a tuple such as (1, 1.6, 2, 3, 4)")
    if not isinstance(recipe.pins, Mapping):
        raise RecipeError(f"pins={recipe.pins!r} must map patterns to widths")
    if not all(isinstance(pattern, str) for pattern in recipe.pins):
        raise RecipeError(f"pins={recipe.pins!r}: a pattern is not a string")


def _check_adapter(recipe: Recipe) -> None:
    share = recipe.lora_dropout
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise RecipeError(f"lora_dropout={share!r} must be a share from 0 to below 1, such as 0.05")
    ranks = recipe.rank_pattern
    if not isinstance(ranks, Mapping) or not all(isinstance(pattern, str) for pattern in ranks):
        raise RecipeError(f"rank_pattern={ranks!r} must map patterns to ranks")
    for pattern, rank in ranks.items():
        check_whole(f"rank_pattern[{pattern!r}]", rank, 0)


def _check_ranks(recipe: Recipe) -> None:
    """Ranks that differ between sites cannot be chosen too, nor are they counted by the budget."""
    for name in ("targets", "rank_pattern"):
        if not getattr(recipe, name):
            continue
        if recipe.rank == "auto":
            raise RecipeError(f"{name} fixes ranks that rank='auto' chooses; leave one out")
        if recipe.count_adapters:
            raise RecipeError(
                f"count_adapters=True counts one rank at all sites, and {name} gives them several; "
                "leave one out"
            )


def _check_widths(recipe: Recipe) -> None:
    for width in (*(recipe.widths or ()), *recipe.pins.values()):
        if (type(width), width) not in [(type(legal), legal) for legal in WIDTHS]:
            raise RecipeError(f"width {width!r} is not one of {', '.join(map(str, WIDTHS))}")
    if recipe.widths is not None and not recipe.widths:
        raise RecipeError("widths is empty; name at least one")


def _check_listed(recipe: Recipe) -> None:
    """Whole numbers out of a short list."""
    if recipe.group is not None and (type(recipe.group) is not int or recipe.group < -1):
        raise RecipeError(f"group={recipe.group!r} must be -1 (per row), 0 (none) or positive")
    for name, legal in (
        ("scale_bits", SCALE_BITS), ("codebook_bits", CODEBOOK_BITS), ("guided", GUIDED),
    ):  # fmt: skip
        value = getattr(recipe, name)
        if value is not None and (type(value) is not int or value not in legal):
            raise RecipeError(f"{name}={value!r} is not one of {', '.join(map(str, legal))}")
    bits = recipe.correction_bits
    if type(bits) is not int or bits not in CORRECTION_BITS:
        raise RecipeError(f"correction_bits={bits!r} must be 4 or 8")


def _check_layouts(layouts: Any) -> None:
    if layouts is None or layouts == "auto":
        return
    texts = patterns("layouts", layouts)
    if not texts:
        raise RecipeError("layouts is empty; name at least one, or use layouts='auto'")
    for text in texts:
        Layout.parse(text)


def _check_choosing(recipe: Recipe) -> None:
    """What cannot stand beside layouts to choose from."""
    if recipe.layouts is None:
        return
    for name in ("group", "shared_codebooks", "scale_bits", "codebook_bits", "trellis"):
        if getattr(recipe, name) is not None:
            raise RecipeError(
                f"{name}={getattr(recipe, name)!r} fixes what layouts= chooses; leave one out"
            )
    if recipe.rank == "auto" and len(recipe.candidate_layouts) > 1:
        raise RecipeError(
            "rank='auto' and layouts are both chosen per site, and not priced together; fix one"
        )


def _check_preset(recipe: Recipe) -> None:
    """Preset "lowra" is the paper to the letter, and its options are its own."""
    for name in ("threshold_average", "loftq_mappings"):
        if not recipe.is_paper and getattr(recipe, name) is not None:
            raise RecipeError(f"{name}={getattr(recipe, name)!r} needs preset='lowra'")
    fixed = {
        "unit": recipe.unit != "row", "pins": bool(recipe.pins), "group": recipe.group == 0,
        "shared_codebooks": recipe.shared_codebooks, "count_adapters": recipe.count_adapters,
        "correction_rank": recipe.correction_rank > 0, "tune": recipe.tune != "none",
        "guided": recipe.guided != 0, "statistics": recipe.statistics != "full",
        "widths": TERNARY in (recipe.widths or ()),
        "scale_bits": recipe.scale_bits not in (None, 16),
        "codebook_bits": recipe.codebook_bits not in (None, 16),
        "layouts": recipe.layouts is not None, "trellis": bool(recipe.trellis),
    }  # fmt: skip
    changed = [name for name, differs in fixed.items() if differs]
    if recipe.is_paper and changed:
        raise RecipeError(
            f"{changed[0]}={getattr(recipe, changed[0])!r} is not part of preset 'lowra', "
            "which is the paper to the letter; use preset 'default'"
        )


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
