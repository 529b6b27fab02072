"""Which rows are kept and which are measured again; what is missing is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results_file
from benchmarks.quality import __main__ as command
from benchmarks.quality import rows as rows_module
from benchmarks.quality.protocol import PROTOCOL
from benchmarks.quality.rows import (
    Job,
    add_row,
    is_finished,
    merged_missing,
    missing_by_reason,
    read_document,
    replaced,
)


def job(name: str = "hqq-2", version: str = "hqq 1", **settings: Any) -> Job:
    return Job(name, "hqq", settings or {"bits": 2}, version, lambda: {"stored_bits": 2.5})


def row(name: str = "hqq-2", version: str = "hqq 1") -> dict[str, Any]:
    return {"name": name, "method": "hqq", "settings": {"bits": 2}, "version": version}


def finished(job: Job, *rows: Any, rerun: tuple[str, ...] = (), keep: bool = False) -> bool:
    return is_finished(job, rows, rerun=rerun, keep=keep)


def test_a_row_of_the_same_name_settings_and_version_is_kept() -> None:
    assert finished(job(), row())
    assert not finished(job())
    assert not finished(job(), row("hqq-3"))
    assert not finished(job(bits=3), row())


def test_another_version_is_measured_again_unless_kept() -> None:
    assert not finished(job(version="hqq 2"), row())
    assert finished(job(version="hqq 2"), row(), keep=True)


@pytest.mark.parametrize("name", ["hqq-2", "hqq"])
def test_rerun_takes_a_row_or_a_method(name: str) -> None:
    assert not finished(job(), row(), rerun=(name,), keep=True)
    assert finished(job(), row(), rerun=("nf4",))


def test_a_row_says_what_it_is_and_what_was_measured() -> None:
    made = job().row()
    assert made["name"] == "hqq-2" and made["stored_bits"] == 2.5
    assert made["version"] == "hqq 1" and made["seconds"] >= 0 and made["date"]
    assert finished(job(), made)


def test_a_new_row_takes_the_old_ones_place() -> None:
    old = [row("a"), row("b"), row("c")]
    new = row("b", "hqq 2")
    assert replaced(old, new) == [row("a"), new, row("c")]
    assert replaced(old, row("d"))[-1] == row("d")
    assert old == [row("a"), row("b"), row("c")]


def test_what_has_rows_is_not_missing_and_the_rest_keeps_its_reason() -> None:
    known = {"gptq": "not installed: gptqmodel", "loftq-2": "ImportError: scipy"}
    found = {"hqq": "not measured yet", "nf4": None, "loftq-2": None}
    assert merged_missing(known, found, []) == {
        "gptq": "not installed: gptqmodel", "hqq": "not measured yet",
    }  # fmt: skip
    assert "hqq" not in merged_missing(known, found, [row()])


def test_names_that_share_a_reason_share_a_line() -> None:
    missing = {"a": "not installed: x", "b": "ValueError: y", "c": "not installed: x"}
    assert missing_by_reason(missing) == ["a, c: not installed: x", "b: ValueError: y"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for module in (results_file, rows_module):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    yield tmp_path


def test_the_document_is_read_back_and_grows(folder: Path) -> None:
    assert read_document() == {"rows": [], "missing": {}}
    add_row({"model": "tiny"}, {"gptq": "why", "hqq": "not measured yet"}, row())
    assert read_document() == {"rows": [row()], "missing": {"gptq": "why"}}
    assert json.loads((folder / "quality.json").read_text())["protocol"] == {"model": "tiny"}
    grown = add_row({"model": "tiny"}, {"gptq": None}, row("hqq-3"))
    assert grown == read_document() == {"rows": [row(), row("hqq-3")], "missing": {}}


def test_the_version_of_ours_follows_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "__init__.py").write_text("a = 1")
    monkeypatch.setattr(rows_module.lowra, "__file__", str(tmp_path / "__init__.py"))
    before = rows_module.code_version()
    assert before == rows_module.code_version()
    (tmp_path / "kernel.cpp").write_text("int b;")
    assert rows_module.code_version() != before


def test_rows_of_another_document_are_merged_by_method(folder: Path) -> None:
    add_row(PROTOCOL, {}, row())
    other = folder / "other.json"
    rows = [row(version="hqq 2"), {**row("default 2"), "method": "default"}, row("hqq-4-axis1")]
    missing = {"hqq-1-axis1": "KeyError: x", "gptq": "not installed: gptqmodel"}
    other.write_text(json.dumps({"protocol": PROTOCOL, "rows": rows, "missing": missing}))
    merged = command.merge(other, ["hqq"])
    assert merged == read_document()
    assert merged["rows"] == [rows[0], rows[2]]
    assert merged["missing"] == {"hqq-1-axis1": "KeyError: x"}


def test_rows_of_another_protocol_are_refused(folder: Path) -> None:
    other = folder / "other.json"
    other.write_text(json.dumps({"protocol": {"windows": 1}, "rows": [], "missing": {}}))
    with pytest.raises(SystemExit, match="another protocol"):
        command.merge(other, ["hqq"])
