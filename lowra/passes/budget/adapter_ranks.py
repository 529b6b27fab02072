"""The LoRA rank of a site by its name: targets, patterns, and how a rank scales the output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lowra.compiler.errors import RecipeError
from lowra.compiler.program import matches, select

RankPattern = tuple[str, int]
"""A pattern and the rank of the sites that it matches."""


def parse_ranks(entries: Iterable[str]) -> tuple[RankPattern, ...]:
    """`("*.q_proj=8",)` as `(("*.q_proj", 8),)`. Raises RecipeError for what is no rank."""
    parsed: list[RankPattern] = []
    for entry in entries:
        pattern, _, rank = entry.rpartition("=")
        if not pattern or not rank.isdecimal():
            raise RecipeError(f"rank pattern {entry!r} is not PATTERN=RANK, such as *.q_proj=8")
        parsed.append((pattern, int(rank)))
    return tuple(parsed)


def rank_of(name: str, rank: int, targets: Sequence[str], patterns: Sequence[RankPattern]) -> int:
    """The rank of the site `name`: 0 where `targets` leave it out, the first pattern's, `rank`."""
    if targets and not any(matches(name, target) for target in targets):
        return 0
    return next((own for pattern, own in patterns if matches(name, pattern)), rank)


def scaling_of(alpha: float, rank: int, rslora: bool) -> float:
    """What B A x is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA); alpha 0 stands for r."""
    alpha = alpha or float(rank)
    return alpha / (rank**0.5 if rslora else rank)


def check_patterns(
    names: Sequence[str], targets: Sequence[str], patterns: Sequence[RankPattern]
) -> None:
    """Raise PatternError for a pattern that matches none of the sites `names`."""
    select(names, targets, "targets")
    select(names, [pattern for pattern, _ in patterns], "rank_pattern")
