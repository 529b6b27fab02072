"""Plan files: a plan as JSON, read back, held against a model, and turned into facts again.

Row widths of a site are stored as the distinct widths and, per row, a byte that indexes them,
deflated and in base64.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.errors import OutputError, PlanError
from lowra.compiler.facts import AdapterRank, Precision
from lowra.compiler.layout import Layout, with_plain_codes
from lowra.compiler.packing import WIDTHS, width_of
from lowra.compiler.program import Program, Site
from lowra.recipe import Recipe

FORMAT = "lowra-plan"
VERSION = 2
"""Version 1 is version 2 of a recipe without trellis codes."""


def encode_widths(row_widths: Tensor) -> dict[str, Any]:
    """Plain data of ids of widths [n]; `decode_widths` reads it back."""
    ids, index = row_widths.unique(return_inverse=True)
    widths = [width_of(id) for id in ids.tolist()]
    packed = zlib.compress(index.to(torch.uint8).numpy().tobytes(), 9)
    return {"widths": widths, "index": base64.b64encode(packed).decode("ascii")}


def decode_widths(data: Mapping[str, Any], site: Site, layout: Layout) -> Tensor:
    """Ids of widths in a layout, uint8 [n]. Raises PlanError for data that does not fit."""
    try:
        packed = base64.b64decode(data["index"], validate=True)
        unpacker = zlib.decompressobj()
        index = unpacker.decompress(packed, site.n + 1)
        strange = [width for width in data["widths"] if width not in WIDTHS]
        if strange:
            raise ValueError(f"{strange[0]!r} is no width; the widths are {WIDTHS}")
        ids = torch.tensor([*map(layout.width_id, data["widths"])], dtype=torch.uint8)
        if len(index) != site.n or not unpacker.eof:
            raise ValueError(f"it holds {len(index)} rows or more, not {site.n}")
        return ids[torch.frombuffer(bytearray(index), dtype=torch.uint8).long()]
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError,
            binascii.Error, zlib.error) as error:  # fmt: skip
        raise PlanError(
            f"the plan's row widths of {site.name} cannot be read ({error}); write the plan again"
        ) from error


def check_plan_path(path: Path, overwrite: bool) -> Path:
    """The path, where a plan can be written. Raises OutputError."""
    path = path.expanduser()
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists; choose another name, or overwrite a plan")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.parent} is no folder; make it first")
    return path


def write_plan(plan: Mapping[str, Any], path: Path, overwrite: bool = False) -> Path:
    """Write a plan as JSON, whole or not at all. Raises OutputError."""
    path = check_plan_path(path, overwrite)
    document = {"format": FORMAT, "version": VERSION, **plan}
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write the plan {path}: {error.strerror}") from error
    return path


def read_plan(source: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """A plan from a file, or from the data of `model.lowra.plan`. Raises PlanError."""
    data: Any = source
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r} ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"{str(path)!r} is no plan: lowra plan --out writes one")
        if data.get("version") not in (1, VERSION):
            raise PlanError(
                f"{str(path)!r} has plan version {data.get('version')!r}; "
                f"this lowra reads 1 and {VERSION}"
            )
        if data["version"] == 1 and isinstance(data.get("recipe"), dict):
            data["recipe"] = with_plain_codes(data["recipe"])
    if not isinstance(data, Mapping):
        raise PlanError(f"plan is a {type(data).__name__}; give a path or model.lowra.plan")
    sites = data.get("sites")
    whole = isinstance(data.get("recipe"), Mapping) and isinstance(sites, (list, tuple))
    if not whole or not all(
        isinstance(s, Mapping) and {"name", "shape"} <= set(s) for s in sites or ()
    ):
        raise PlanError("the plan lacks its recipe or its sites; write it again")
    return dict(data)


def check_plan(program: Program, plan: Mapping[str, Any]) -> None:
    """Raise PlanError, naming the first site that differs, for the plan of another model."""
    planned = {row["name"]: list(row["shape"]) for row in plan["sites"]}
    for site in program.sites:
        if site.name not in planned:
            raise PlanError(f"this plan is for another model: it has no site {site.name}")
        if planned[site.name] != [site.n, site.k]:
            raise PlanError(
                f"this plan is for another model: {site.name} is [{site.n}, {site.k}] here and "
                f"{planned[site.name]} in the plan"
            )
    known = {site.name for site in program.sites}
    for name in planned:
        if name not in known:
            raise PlanError(f"this plan is for another model: this one has no site {name}")
    wanted = plan.get("fingerprint")
    if wanted and wanted != program.fingerprint:
        raise PlanError(
            "this plan is for another model: the shapes agree but the weights do not (fingerprint "
            f"{program.fingerprint[:12]} here, {str(wanted)[:12]} in the plan); "
            "plan the model again, or load it as it was planned, dtype included"
        )


def has_widths(plan: Mapping[str, Any]) -> bool:
    """True where a compile made the plan, so that its row widths can be replayed."""
    return bool(plan["sites"]) and all("row_widths" in row for row in plan["sites"])


def with_planned(program: Program, plan: Mapping[str, Any]) -> Program:
    """The program with the widths (and layouts and ranks, where they were chosen) of a plan as
    facts."""
    rows = {row["name"]: row for row in plan["sites"]}
    recipe = Recipe.from_dict(plan["recipe"])
    layouts = recipe.candidate_layouts
    facts: dict[str, list[object]] = {}
    for site in program.sites:
        row = rows[site.name]
        chosen = "layout" in row or len(layouts) > 1
        layout = _layout(row, layouts) if chosen else recipe.layout
        facts[site.name] = [Precision(decode_widths(row["row_widths"], site, layout))]
        if chosen:
            facts[site.name].append(layout)
        if "rank" in row:
            rank = row["rank"]
            if type(rank) is not int or not 0 <= rank <= min(site.n, site.k):
                raise PlanError(f"the plan's rank of {site.name} is {rank!r}; write the plan again")
            facts[site.name].append(AdapterRank(rank))
    return program.with_facts(facts)


def _layout(row: Mapping[str, Any], layouts: Sequence[Layout]) -> Layout:
    """The layout that a plan chose for a site, one of its recipe's. Raises PlanError."""
    known = {str(layout): layout for layout in layouts}
    if row.get("layout") not in known:
        raise PlanError(
            f"the plan's layout of {row['name']} is {row.get('layout')!r}, not one of its recipe's "
            f"({', '.join(known)}); write the plan again"
        )
    return known[row["layout"]]
