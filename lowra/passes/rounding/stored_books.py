"""Codebooks as named tensors in the spill folder, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from lowra.compiler.errors import OutputError
from lowra.compiler.facts import Codebooks, LayoutFits
from lowra.compiler.layout import Layout
from lowra.compiler.program import Program
from lowra.compiler.spill import read_tensors


def flat_books(books: Codebooks) -> dict[str, Tensor]:
    """Codebooks as named tensors."""
    scales = {f"scales.{b}": scale.clone() for b, scale in (books.scales or {}).items()}
    borders = {f"thresholds.{b}": table for b, table in (books.thresholds or {}).items()}
    span = {} if books.span is None else {"span": books.span}
    levels = {f"levels.{b}": table for b, table in books.levels.items()}
    return levels | scales | borders | span | {"loss": books.loss}


def books_from(
    stored: Mapping[str, Tensor], widths: tuple[float, ...], layout: Layout, absmax: bool = False
) -> Codebooks:
    """The inverse of `flat_books`."""
    scales = {b: stored[f"scales.{b}"] for b in widths if f"scales.{b}" in stored}
    borders = {b: stored[f"thresholds.{b}"] for b in widths if f"thresholds.{b}" in stored}
    return Codebooks(
        widths, {b: stored[f"levels.{b}"] for b in widths}, scales or None, stored["loss"],
        layout.group, layout.shared, absmax=absmax, thresholds=borders or None,
        compact=layout.compact, span=stored.get("span"), trellis=layout.trellis,
    )  # fmt: skip


def in_layouts(program: Program, layouts: Mapping[str, Layout]) -> Program:
    """The program with every site in the layout given, out of those that were fitted.

    Raises OutputError for a work file that is damaged.
    """
    facts: dict[str, list[object]] = {}
    for site in program.sites:
        fits, layout = program.fact(site.name, LayoutFits), layouts[site.name]
        path = fits.files[layout]
        facts[site.name] = [layout, books_from(_read(path), fits.widths, layout)]
    return program.with_facts(facts)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"work file {path} is damaged ({error}); delete it") from error
