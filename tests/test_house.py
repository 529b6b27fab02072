"""The rules of the house that a machine can hold."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
LOWRA = REPO / "lowra"
SOURCES = sorted(LOWRA.rglob("*.py"))
PASS_FILES = sorted(p.stem for p in (LOWRA / "passes").glob("*.py") if p.stem != "__init__")
HEAVY = {"ortools", "transformers", "onnx", "triton", "rich"}
VAGUE = {"utils", "util", "helpers", "helper", "common"}


def test_no_file_reaches_400_lines() -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in SOURCES}
    long = {str(p.relative_to(REPO)): n for p, n in lengths.items() if n >= 400}
    assert not long, f"split these: {long}"


def test_no_file_has_a_vague_name() -> None:
    names = [p.relative_to(REPO) for p in LOWRA.rglob("*") if p.stem.strip("_") in VAGUE]
    assert not names, f"name these after what they hold: {[str(p) for p in names]}"


@pytest.mark.parametrize("stem", PASS_FILES)
def test_class_file_and_name_of_a_pass_agree(stem: str) -> None:
    from lowra.compiler.pipeline import Pass

    module = importlib.import_module(f"lowra.passes.{stem}")
    passes = [
        cls
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, Pass) and cls.__module__ == module.__name__
    ]
    assert len(passes) == 1, f"a pass per file, and nothing else: {[c.__name__ for c in passes]}"
    (cls,) = passes
    words = re.findall(r"[A-Z][a-z0-9]*", cls.__name__)
    assert "".join(words) == cls.__name__, f"{cls.__name__} is not CamelCase"
    assert stem == "_".join(words).lower(), f"{cls.__name__} lives in {stem}.py"
    assert cls.name == stem.replace("_", "-")


def test_import_lowra_stays_light() -> None:
    """Only what lowra itself pulls in counts: torch is imported first."""
    code = (
        "import sys, torch; before = set(sys.modules); import lowra; "
        "sys.stdout.write(' '.join({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())
