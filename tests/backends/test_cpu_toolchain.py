"""Building and keeping kernels: what a user's machine may lack or break."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowra.backends.cpu import toolchain

SOURCE = 'extern "C" int answer() { return 42; }\n'
COMPILER = toolchain.find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home folder, and no library loaded yet."""
    monkeypatch.setenv("LOWRA_HOME", str(tmp_path))
    toolchain.library.cache_clear()
    toolchain._explained.clear()
    yield tmp_path
    toolchain.library.cache_clear()
    toolchain._explained.clear()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@needs_compiler
def test_a_library_is_built_once_and_kept(tmp_path: Path) -> None:
    assert COMPILER is not None
    first = toolchain.load(SOURCE, "answer", COMPILER, tmp_path / "kernels")
    assert first.answer() == 42
    (built,) = (tmp_path / "kernels").iterdir()
    stamp = built.stat().st_mtime_ns
    assert toolchain.load(SOURCE, "answer", COMPILER, tmp_path / "kernels").answer() == 42
    assert built.stat().st_mtime_ns == stamp


@needs_compiler
def test_a_damaged_library_is_built_anew(tmp_path: Path) -> None:
    assert COMPILER is not None
    toolchain.load(SOURCE, "answer", COMPILER, tmp_path)
    (built,) = tmp_path.iterdir()
    built.unlink()
    built.write_bytes(b"not a library")
    assert toolchain.load(SOURCE, "answer", COMPILER, tmp_path).answer() == 42


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written_is_replaced(tmp_path: Path) -> None:
    assert COMPILER is not None
    tmp_path.chmod(0o500)
    assert toolchain.load(SOURCE, "answer", COMPILER, tmp_path / "kernels").answer() == 42


@needs_compiler
def test_another_cpu_never_sees_this_library(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COMPILER is not None
    here = toolchain._key(SOURCE, COMPILER)
    monkeypatch.setattr(toolchain, "cpu_model", lambda: "another")
    assert toolchain._key(SOURCE, COMPILER) != here
    assert toolchain._key(SOURCE + " ", COMPILER) != here


def test_a_compiler_that_fails_leaves_a_log_and_one_warning(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(script(home / "broken-c++", "echo no such flag >&2; exit 1")))
    assert toolchain.library("lloyd") is None
    assert toolchain.library("codes") is None
    messages = [r.getMessage() for r in caplog.records if "CPU kernels" in r.getMessage()]
    assert len(messages) == 1 and "broken-c++ failed" in messages[0]
    (log, *_) = sorted((home / "kernels").glob("*.log"))
    assert "no such flag" in log.read_text()
    assert not list((home / "kernels").glob("*.so"))


def test_no_compiler_is_said_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(home))
    assert toolchain.library("lloyd") is None and toolchain.library("codes") is None
    messages = [r.getMessage() for r in caplog.records if "CPU kernels" in r.getMessage()]
    assert len(messages) == 1 and "install g++ or clang++" in messages[0]


def test_kernels_can_be_switched_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(toolchain.SWITCH, "off")
    assert toolchain.library("lloyd") is None
    assert not (home / "kernels").exists()


@needs_compiler
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    code = (
        "import torch, lowra\n"
        "x = torch.linspace(-1, 1, 40).view(2, 20)\n"
        "s, _ = torch.ops.lowra.lloyd_scales(x, torch.ones(1, 1), [torch.tensor([-1., 1.])], 9, 0.)"
        "\nprint(s.view(-1).tolist())"
    )
    environment = {**os.environ, "LOWRA_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs[0] == outputs[1] and outputs[0].startswith(b"[")
    assert len(list((tmp_path / "kernels").glob("lloyd-*.so"))) == 1
    assert not list((tmp_path / "kernels").glob(".build-*"))


@needs_compiler
def test_sources_compile_without_a_warning(tmp_path: Path) -> None:
    assert COMPILER is not None
    for name in ("lloyd", "codes"):
        file = tmp_path / f"{name}.cpp"
        file.write_text(toolchain.source_of(name))
        done = subprocess.run(
            [
                COMPILER, *toolchain.FLAGS, *toolchain.NATIVE, "-Wall", "-Wextra", str(file),
                "-o", str(tmp_path / "x"),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and done.stderr == ""


def loops_of(assembly: str) -> list[list[str]]:
    """Instructions between one label or jump and the next."""
    found: list[list[str]] = [[]]
    for line in assembly.splitlines():
        if not line.startswith("\t"):
            found.append([])
        elif not line.startswith("\t."):
            found[-1].append(line.strip())
            if line.startswith("\tj"):
                found.append([])
    return found


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 instructions")
@pytest.mark.skipif("clang" in str(COMPILER), reason="reads what gcc writes")
@pytest.mark.parametrize(("level", "sums"), [("x86-64-v3", 12), ("x86-64-v4", 16)])
def test_sums_of_coordinate_descent_stay_in_registers(
    tmp_path: Path, level: str, sums: int
) -> None:
    assert COMPILER is not None
    source, assembly = tmp_path / "codes.cpp", tmp_path / "codes.s"
    source.write_text(toolchain.source_of("codes"))
    options = [f for f in toolchain.FLAGS if f != "-shared"]
    command = [COMPILER, *options, f"-march={level}", "-S", str(source), "-o", str(assembly)]
    subprocess.run(command, check=True)
    products = [
        [i for i in loop if re.match(r"vmov\w+\s+%[xyz]mm\d+,.*\(", i)]
        for loop in loops_of(assembly.read_text())
        if sum(bool(re.match(r"vfn?madd", i)) for i in loop) >= sums
    ]
    assert [] in products, f"every loop of {sums} products stores what it adds: {products}"
