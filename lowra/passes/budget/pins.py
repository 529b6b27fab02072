"""Pins: widths that the user fixes by pattern, and what they cost a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lowra.compiler.errors import RecipeError
from lowra.compiler.program import Site, matches

Pin = tuple[str, float]
"""A pattern and the width of the sites that it matches."""


def parse_pins(pins: Sequence[str], widths: Sequence[float]) -> tuple[Pin, ...]:
    """`("*.q_proj=4",)` as `(("*.q_proj", 4),)`. Raises RecipeError for a width not among them."""
    known = {str(width): width for width in widths}
    parsed: list[Pin] = []
    for pin in pins:
        pattern, _, width = pin.rpartition("=")
        if width not in known:
            raise RecipeError(f"pin {pin!r}: the width must be one of {tuple(widths)}")
        parsed.append((pattern, known[width]))
    return tuple(parsed)


def pinned_widths(
    sites: Sequence[Site], groups: Sequence[Sequence[Site]], pins: Sequence[Pin]
) -> dict[str, Pin]:
    """The pin of each pinned site: the first that matches it, or a site of its group.

    Raises RecipeError where pins give two widths to a group that must have one.
    """
    own = {site.name: pin for site in sites if (pin := _first(site.name, pins)) is not None}
    for group in groups:
        found = {site.name: own[site.name] for site in group if site.name in own}
        if len({width for _, width in found.values()}) > 1:
            said = ", ".join(f"{name} {pin}={width}" for name, (pin, width) in found.items())
            raise RecipeError(
                f"unit='siblings' gives one width to {', '.join(site.name for site in group)}, "
                f"but pins give several: {said}; pin them alike, or use unit='row'"
            )
        for site in group if found else ():
            own.setdefault(site.name, next(iter(found.values())))
    return own


def _first(name: str, pins: Sequence[Pin]) -> Pin | None:
    return next((pin for pin in pins if matches(name, pin[0])), None)


def bill_of_pins(
    sites: Sequence[Site], pinned: Mapping[str, Pin], bits_of: Callable[[Site, float], float]
) -> str:
    """What each pin spends, of which sites: the end of a message about a budget out of reach."""
    weights = sum(site.weights for site in sites)
    spent: dict[Pin, float] = {}
    count: dict[Pin, int] = {}
    for site in sites:
        if (pin := pinned.get(site.name)) is not None:
            spent[pin] = spent.get(pin, 0.0) + bits_of(site, pin[1])
            count[pin] = count.get(pin, 0) + 1
    parts = [
        f"{pattern}={width:g} takes {bits / weights:.3f} bits per weight of the model "
        f"({count[pattern, width]} sites)"
        for (pattern, width), bits in spent.items()
    ]
    return f"; the pin {', the pin '.join(parts)}" if parts else ""
