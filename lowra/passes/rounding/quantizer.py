"""From codebooks and widths to a packed weight; shared by quantize-weights and LoftQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowra.compiler.facts import Codebooks
from lowra.compiler.packing import levels_of, trellis_runs, width_of
from lowra.compiler.rotation import Rotation
from lowra.compiler.storage import PackedWeight, pack_weight
from lowra.passes.rounding.feedback import feedback_codes, nearest_codes
from lowra.passes.rounding.guidance import Guides, row_groups
from lowra.passes.rounding.moments import InputMoments
from lowra.passes.rounding.refine import Rounded, refine


def quantize(
    weight: Tensor, moments: InputMoments | None, books: Codebooks,
    row_widths: Tensor, rotation: Rotation, rounds: int = 0,
) -> PackedWeight:  # fmt: skip
    """Quantize float32 [n, k], given in the coordinates of `rotation`.

    With `moments`, codes come from error feedback, and at most `rounds` times each row's scale is
    refit in closed form and its codes descend, until its output error stops falling; without, each
    weight goes to its nearest level, or where the codebooks' own thresholds send it.
    """
    if moments is not None:
        state = rounded(weight, moments, books, row_widths, rounds)
        return _packed(state, books, row_widths, rotation)
    tables, scales = row_tables(books, row_widths)
    borders = row_thresholds(books, row_widths)
    codes = nearest_codes(weight, tables, scales, books.group, borders, trellis_runs(row_widths))
    return _packed(Rounded(codes, tables, scales, books.group), books, row_widths, rotation)


def quantize_guided(
    weight: Tensor, guides: Guides, books: Codebooks, row_widths: Tensor, rotation: Rotation,
    rounds: int = 0,
) -> PackedWeight:  # fmt: skip
    """The same with a metric for each group of rows (`whole_groups`), and behind a prefix each
    group's weight that makes up for it in that metric. Shared codebooks are those of all rows."""
    parts: list[Rounded] = []
    groups = whole_groups(row_widths, len(guides))
    for index, rows in groups.items():
        moments = guides[index]()
        target = moments.target(weight[rows])
        parts.append(rounded(target, moments, rows_of(books, rows), row_widths[rows], rounds))
    return _packed(_joined(parts, [*groups.values()]), books, row_widths, rotation)


def whole_groups(row_widths: Tensor, groups: int) -> dict[int, Tensor]:
    """The rows int64 of each group (`row_groups`) that has some.

    No run of trellis codes is cut in two: all of it goes where most of its rows belong. Rows of one
    width lie apart where a site mixes widths, so a run may take rows of a site from other groups.
    """
    group = torch.empty(len(row_widths), dtype=torch.int64)
    for index, rows in enumerate(row_groups(len(row_widths), groups)):
        group[rows] = index
    runs = trellis_runs(row_widths)
    if runs is not None:
        inside = runs >= 0
        votes = torch.zeros(int(runs.max()) + 1, groups)
        votes.index_put_((runs[inside], group[inside]), torch.ones(()), accumulate=True)
        group[inside] = votes.argmax(1)[runs[inside]]
    return {int(index): (group == index).nonzero().squeeze(1) for index in group.unique()}


def rounded(
    weight: Tensor, moments: InputMoments, books: Codebooks, row_widths: Tensor, rounds: int
) -> Rounded:
    """Codes by error feedback, then at most `rounds` of refinement."""
    tables, scales = row_tables(books, row_widths)
    runs = trellis_runs(row_widths)
    codes = feedback_codes(weight, moments.factor, tables, scales, books.group, runs)
    state = Rounded(
        codes, tables, scales, books.group, books.shared, books.compact, books.span, runs
    )
    return refine(weight, moments.gram, state, rounds)


def _joined(parts: Sequence[Rounded], rows: Sequence[Tensor]) -> Rounded:
    """The rows of all parts, each where `rows` says."""
    back = torch.argsort(torch.cat([*rows]))
    levels = max(part.tables.shape[1] for part in parts)
    tables = [
        nn.functional.pad(part.tables, (0, levels - part.tables.shape[1]), value=torch.inf)
        for part in parts
    ]
    scales = [part.scales for part in parts if part.scales is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts])[back],
        tables=torch.cat(tables)[back],
        scales=torch.cat(scales)[back] if scales else None,
        runs=None,
    )


def _packed(
    state: Rounded, books: Codebooks, row_widths: Tensor, rotation: Rotation
) -> PackedWeight:
    stored = books.levels if books.shared else state.tables
    return pack_weight(
        state.codes, row_widths, stored, state.scales, books.group, rotation, books.compact,
        books.span,
    )  # fmt: skip


def rows_of(books: Codebooks, rows: Tensor | slice) -> Codebooks:
    """The codebooks of some rows, for error feedback: without thresholds."""
    levels = books.levels
    if not books.shared:
        levels = {b: table[rows] for b, table in books.levels.items()}
    scales = None if books.scales is None else {b: s[rows] for b, s in books.scales.items()}
    return replace(books, levels=levels, scales=scales, loss=books.loss[rows], thresholds=None)


def row_tables(books: Codebooks, row_widths: Tensor) -> tuple[Tensor, Tensor | None]:
    """Levels [n, L] (narrow rows filled with +inf) and scales [n, groups] at the rows' widths."""
    n = row_widths.shape[0]
    used = [int(id) for id in row_widths.unique()]
    tables = torch.full((n, max(map(levels_of, used))), torch.inf)
    scales: Tensor | None = None
    for id in used:
        rows, width = row_widths == id, width_of(id)
        levels = books.levels[width]
        tables[rows, : levels_of(id)] = levels if books.shared else levels[rows]
        if books.scales is not None:
            scales = torch.zeros(n, books.scales[width].shape[1]) if scales is None else scales
            scales[rows] = books.scales[width][rows]
    return tables, scales


def row_thresholds(books: Codebooks, row_widths: Tensor) -> Tensor | None:
    """Thresholds [n, L - 1] at the rows' widths, narrow rows filled with +inf; None for middles."""
    if books.thresholds is None:
        return None
    used = [int(id) for id in row_widths.unique()]
    borders = torch.full((row_widths.shape[0], max(map(levels_of, used)) - 1), torch.inf)
    for id in used:
        rows = row_widths == id
        borders[rows, : levels_of(id) - 1] = books.thresholds[width_of(id)][rows]
    return borders
