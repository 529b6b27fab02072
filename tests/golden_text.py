"""Golden texts: what a test printed last time, kept beside the tests and compared.

The file of `tests/passes/test_pack.py::test_rows[llama]` is
`tests/golden/passes/test_pack/test_rows-llama.txt`. A golden that no test reads is stale: a green
run of the whole suite fails and names it. Tests left out by `-m`, `-k` or a skip are excused; a
run of some paths only is not judged.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

FLAG = "--update-golden"
ROOT = Path(__file__).parent / "golden"


def golden_path(nodeid: str, root: Path = ROOT) -> Path:
    """The file of a test, or the folder of a whole test module."""
    module, _, test = nodeid.partition("::")
    folder = root / Path(module).relative_to("tests").with_suffix("")
    if not test:
        return folder
    return folder / (re.sub(r"[^\w.]+", "-", test).strip("-") + ".txt")


class GoldenFile:
    """The golden text of one test; its one verb is `check`."""

    def __init__(self, path: Path, update: bool, read: set[Path]) -> None:
        self.path, self._update, self._read = path, update, read

    def check(self, text: str) -> None:
        __tracebackhide__ = True
        if self.path in self._read:
            pytest.fail(f"{self.path.name} was checked before: one golden per test")
        self._read.add(self.path)
        text = text.rstrip("\n") + "\n"
        if self._update:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text, encoding="utf-8")
            return
        if not self.path.is_file():
            pytest.fail(f"no golden file {self.path}: write it with pytest {FLAG}")
        expected = self.path.read_text(encoding="utf-8")
        if text == expected:
            return
        lines = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), "golden", "printed now", lineterm=""
        )
        diff = "\n".join(lines)
        pytest.fail(f"{self.path} differs; if that is meant, renew it with pytest {FLAG}\n{diff}")


class GoldenPlugin:
    """Hands out golden files and, at the end of a whole green run, looks for stale ones.

    Workers of pytest-xdist send what they read and left out; the process that started them looks.
    """

    def __init__(self, config: pytest.Config, root: Path = ROOT) -> None:
        self.root = root
        self.update: bool = config.getoption(FLAG)
        self.read: set[Path] = set()
        self.excused: set[Path] = set()
        self.stale: list[Path] = []

    def file(self, nodeid: str) -> GoldenFile:
        return GoldenFile(golden_path(nodeid, self.root), self.update, self.read)

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        self.excused.update(golden_path(item.nodeid, self.root) for item in items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.excused.add(golden_path(report.nodeid, self.root))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.excused.add(golden_path(report.nodeid, self.root))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        seen = getattr(node, "workeroutput", {}).get("golden", ())  # a crashed worker has no output
        self.excused.update(map(Path, seen))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["golden"] = [str(path) for path in self.read | self.excused]
            return
        if exitstatus != pytest.ExitCode.OK or not _whole_suite(session.config):
            return
        known = self.read | self.excused
        files = (path for path in self.root.rglob("*") if path.is_file())
        self.stale = sorted(p for p in files if known.isdisjoint((p, *p.parents)))
        if self.stale:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.stale:
            return
        terminalreporter.section("golden files that no test reads", red=True)
        for path in self.stale:
            terminalreporter.line(f"delete it, or bring its test back: {path}")


def _whole_suite(config: pytest.Config) -> bool:
    options = ("collectonly", "lf", "failedfirst", "ignore", "ignore_glob")
    if any(config.getoption(option, None) for option in options):
        return False
    tests = ROOT.parent
    return any(
        (config.invocation_params.dir / arg).resolve() in (tests, tests.parent)
        for arg in config.args
    )
