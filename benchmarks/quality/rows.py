"""Rows of benchmarks/results/quality.json: which are finished, which are measured again.

A row has `name` (unique), `method`, `settings`, `version` (of the code that made it), `date`,
`seconds`, and what was measured: `stored_bits`, `perplexity`, `kl`, and for a method with an
adapter `adapter_bits`, `perplexity_with_adapter`, `kl_with_adapter`; or `unreachable`, the reason.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lowra
from benchmarks.results_file import FOLDER, write_results

Row = dict[str, Any]
NAME = "quality"
ORIGINAL = "original"


@dataclass(frozen=True)
class Job:
    """A row to measure: `run` gives what was measured, without what every row says."""

    name: str
    method: str
    settings: Mapping[str, Any]
    version: str
    run: Callable[[], Row]

    def row(self) -> Row:
        start = time.perf_counter()
        measured = self.run()
        return {
            "name": self.name, "method": self.method, "settings": dict(self.settings),
            **measured, "version": self.version, "date": datetime.date.today().isoformat(),
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip


def is_finished(job: Job, rows: Iterable[Row], *, rerun: Iterable[str], keep: bool) -> bool:
    """Whether `rows` already answer `job`.

    They do with a row of its name, settings and version; `keep` accepts another version, and
    `rerun` (names of rows or methods) accepts none.
    """
    if {job.name, job.method} & set(rerun):
        return False
    known = next((row for row in rows if row["name"] == job.name), None)
    if known is None or known["settings"] != dict(job.settings):
        return False
    return keep or known["version"] == job.version


def replaced(rows: Iterable[Row], row: Row) -> list[Row]:
    """`rows` with `row` in the place of the one of its name, or else at the end."""
    rows = list(rows)
    names = [known["name"] for known in rows]
    if row["name"] not in names:
        return [*rows, row]
    place = names.index(row["name"])
    return [*rows[:place], row, *rows[place + 1 :]]


def merged_missing(
    known: Mapping[str, str], found: Mapping[str, str | None], rows: Iterable[Row]
) -> dict[str, str]:
    """Why methods or rows are missing: `found` (None: it is there now) over `known`.

    What has a row, from whatever day, is not missing.
    """
    present = {row[key] for row in rows for key in ("name", "method")}
    reasons = {**known, **found}
    return {name: why for name, why in sorted(reasons.items()) if why and name not in present}


def missing_by_reason(missing: Mapping[str, str]) -> list[str]:
    """`missing` for a reader: one line per reason, with the names that share it."""
    names: dict[str, list[str]] = {}
    for name, why in missing.items():
        names.setdefault(why, []).append(name)
    return [f"{', '.join(sharing)}: {why}" for why, sharing in names.items()]


def code_version() -> str:
    """lowra's version and a digest of its sources: rows of an older one are measured again."""
    folder = Path(lowra.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return f"lowra {lowra.__version__}+{digest.hexdigest()[:12]}"


def read_document() -> dict[str, Any]:
    """The committed document: its `rows` and `missing`, both empty without a file."""
    path = FOLDER / f"{NAME}.json"
    document = json.loads(path.read_text()) if path.exists() else {}
    return {"rows": document.get("rows", []), "missing": document.get("missing", {})}


def add_row(
    protocol: Mapping[str, Any], found: Mapping[str, str | None], row: Row | None
) -> dict[str, Any]:
    """Write the document with `row` and what was `found` missing; gives its rows and missing.

    It is read anew, so that two commands (in two environments, say) may add to it by turns.
    """
    document = read_document()
    rows = document["rows"] if row is None else replaced(document["rows"], row)
    missing = merged_missing(document["missing"], found, rows)
    write_results(NAME, {"protocol": dict(protocol), "rows": rows, "missing": missing})
    return {"rows": rows, "missing": missing}
