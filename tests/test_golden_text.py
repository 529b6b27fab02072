"""Stale goldens: a whole green run names them, in one process or in several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import golden_text
from tests.golden_text import GoldenPlugin


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("read", "left_out", "stale"):
        (tmp_path / f"{name}.txt").write_text("text\n")
    return tmp_path


def plugin(root: Path) -> GoldenPlugin:
    config: Any = SimpleNamespace(getoption=lambda flag: False)
    return GoldenPlugin(config, root)


def finish(one: GoldenPlugin, status: int = 0, output: dict[str, Any] | None = None) -> int:
    """The end of a run, a worker's where there is an output to fill; its exit status."""
    config = SimpleNamespace() if output is None else SimpleNamespace(workeroutput=output)
    session: Any = SimpleNamespace(config=config, exitstatus=status)
    one.pytest_sessionfinish(session, status)
    return int(session.exitstatus)


def test_workers_tell_what_they_read_and_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden_text, "_whole_suite", lambda config: True)
    starter = plugin(root)
    for told in ("read", "left_out"):
        worker, output = plugin(root), dict[str, Any]()
        (worker.read if told == "read" else worker.excused).add(root / f"{told}.txt")
        assert finish(worker, output=output) == 0 and not worker.stale, "a worker judges nothing"
        starter.pytest_testnodedown(SimpleNamespace(workeroutput=output))
    starter.pytest_testnodedown(SimpleNamespace())  # one that crashed
    assert finish(starter, status=1) == 1 and not starter.stale, "only green runs are judged"
    assert finish(starter) == pytest.ExitCode.TESTS_FAILED
    assert starter.stale == [root / "stale.txt"]


def test_a_run_of_some_paths_is_not_judged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_text, "_whole_suite", lambda config: False)
    one = plugin(root)
    assert finish(one) == 0 and not one.stale
