"""Layout: how a site stores scales and codebooks, and what that costs.

As text a layout is `row8-shared16`: how scales lie and in how many bits (`row8`, one per row;
`64x4`, one per 64 columns; `none`), then whose codebooks are and in how many bits their values
(`shared16` by the rows of a site, `own8` for each row). `row8-shared16-trellis` stores rows of 1, 2
and 3 bits as trellis codes (lowra.compiler.trellis).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowra.compiler.compact import CODEBOOK_BITS, PLAIN, SCALE_BITS, Compact
from lowra.compiler.errors import RecipeError
from lowra.compiler.packing import width_id
from lowra.compiler.stored_bits import NO_SCALES, ROW_SCALES, row_bits, site_bits

FORM = re.compile(r"(?:(row|\d{1,6}x)(\d+)|none)-(shared|own)(\d+)(-trellis)?")


OLD_AUTO = ("row8-shared16", "128x4-shared16", "64x4-shared16")
"""What layouts="auto" was before there were trellis codes."""


def with_plain_codes(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The data of a recipe that was written before there were trellis codes, as it reads today."""
    layouts = recipe.get("layouts")
    if layouts is None:
        return {**recipe, "trellis": False}
    return {**recipe, "layouts": [*OLD_AUTO] if layouts == "auto" else layouts}


@dataclass(frozen=True)
class Layout:
    """Columns per scale (-1 one per row, 0 none), whether a site's rows share a codebook per width,
    in how many bits both are stored, and whether narrow rows are trellis codes. On a site, the
    layout that was chosen for it (a fact)."""

    group: int = ROW_SCALES
    shared: bool = True
    compact: Compact = PLAIN
    trellis: bool = False

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout of a text such as `64x4-shared16`. Raises RecipeError."""
        found = FORM.fullmatch(text)
        if found is None:
            raise RecipeError(
                f"layout {text!r} is none: write row8-shared16, 64x4-shared16 or none-own8 (scales "
                "per row, per 64 columns or none, in so many bits; codebooks shared or a row's own)"
            )
        scales, scale_bits, owner, codebook_bits, trellis = found.groups()
        group = NO_SCALES if scales is None else ROW_SCALES
        group = int(scales[:-1]) if scales not in (None, "row") else group
        compact = Compact(int(scale_bits or 16), int(codebook_bits))
        for what, value, legal in (
            ("scales", compact.scale_bits, SCALE_BITS),
            ("codebook values", compact.codebook_bits, CODEBOOK_BITS),
        ):
            if value not in legal:
                bits = ", ".join(map(str, legal))
                raise RecipeError(f"layout {text!r}: {what} of {value} bits, not {bits}")
        if (group == NO_SCALES and (scales or owner == "shared")) or group > 1 << 16:
            raise RecipeError(
                f"layout {text!r}: shared codebooks need scales, and a scale 1 to 65536 columns"
            )
        if trellis and owner == "own":
            raise RecipeError(f"layout {text!r}: trellis codes need shared codebooks")
        return cls(group, owner == "shared", compact, bool(trellis))

    def __str__(self) -> str:
        scales = f"row{self.compact.scale_bits}"
        if self.group != ROW_SCALES:
            scales = f"{self.group}x{self.compact.scale_bits}" if self.group else "none"
        trellis = "-trellis" if self.trellis else ""
        return f"{scales}-{'shared' if self.shared else 'own'}{self.compact.codebook_bits}{trellis}"

    def width_id(self, width: float) -> int:
        """The id of rows of a width in this layout."""
        return width_id(width, self.trellis)

    def row_bits(self, k: int, width: float) -> int:
        """Stored bits of one row of `k` weights at `width`, with all that it does not share."""
        id = self.width_id(width)
        return row_bits(k, id, self.group, self.shared, self.compact)

    def site_bits(self, n: int, k: int, widths: tuple[float, ...]) -> int:
        """Stored bits beside the rows of a site [n, k] that holds tables of `widths`."""
        ids = tuple(map(self.width_id, widths))
        return site_bits(n, ids, self.shared, self.compact, self.group, k)
