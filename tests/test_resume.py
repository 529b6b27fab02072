"""A work folder: finished work is found again, interrupted work goes on, nothing is left over."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowra
from lowra.compiler.errors import (
    OutputError,
)
from tests.runtime.compiled_models import (
    STACK,
    output,
    remembered_capture,
    stack,
)

X = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowra.api.capture", remembered_capture)


def compile_stack(model: nn.Module | None = None, **options: Any) -> Any:
    return lowra.compile(stack() if model is None else model, **({"example": (X,)} | options))


class Work:
    """Counts Gram matrices collected, codebooks fitted, and sites quantized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reset()
        self.stop_at = 0
        from lowra.passes import collect_statistics, fit_codebooks, quantize_weights

        write, quantize = collect_statistics._write, quantize_weights.quantize
        fit = fit_codebooks.FitCodebooks._fit

        def counted_write(*args: Any) -> None:
            self.statistics += 1
            write(*args)

        def counted_fit(*args: Any) -> Any:
            self.fits += 1
            return fit(*args)

        def counted_quantize(*args: Any, **kwargs: Any) -> Any:
            self.quantized += 1
            if self.quantized == self.stop_at:
                raise KeyboardInterrupt
            return quantize(*args, **kwargs)

        monkeypatch.setattr(collect_statistics, "_write", counted_write)
        monkeypatch.setattr(fit_codebooks.FitCodebooks, "_fit", counted_fit)
        monkeypatch.setattr(quantize_weights, "quantize", counted_quantize)

    def reset(self) -> None:
        self.statistics = self.fits = self.quantized = 0


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Work]:
    yield Work(monkeypatch)


def bytes_of(model: nn.Module, folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in lowra.save(model, folder).glob("*.safetensors")}


def test_a_second_compile_in_one_work_dir_runs_no_model_and_fits_and_quantizes_nothing(
    tmp_path: Path, work: Work
) -> None:
    first = compile_stack(**STACK, work_dir=tmp_path / "work")
    assert work.statistics > 0
    assert (work.fits, work.quantized) == (3, 3)
    work.reset()
    second = compile_stack(**STACK, work_dir=str(tmp_path / "work"))
    assert (work.statistics, work.fits, work.quantized) == (0, 0, 0)
    assert bytes_of(first, tmp_path / "one") == bytes_of(second, tmp_path / "two")


def test_an_interrupted_compile_goes_on_where_it_stopped_and_gives_the_same_bytes(
    tmp_path: Path, work: Work
) -> None:
    work.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        compile_stack(**STACK, work_dir=tmp_path / "work")
    work.stop_at = 0
    work.reset()
    resumed = compile_stack(**STACK, work_dir=tmp_path / "work")
    assert (work.statistics, work.fits, work.quantized) == (0, 0, 1)
    whole = compile_stack(**STACK)
    assert bytes_of(resumed, tmp_path / "one") == bytes_of(whole, tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "statistics", "quantized"),
    [
        ({"bit_budget": 100}, False, True),
        ({"seed": 1}, False, True),
        ({"rank": 2}, False, False),
        ({"calibration": [X + 1]}, True, True),
    ],
    ids=str,
)
def test_what_a_change_touches_is_computed_again_and_nothing_else(
    tmp_path: Path, work: Work, change: dict[str, Any], statistics: bool, quantized: bool
) -> None:
    compile_stack(**STACK, work_dir=tmp_path)
    work.reset()
    compile_stack(**{**STACK, **change}, work_dir=tmp_path)
    assert (work.statistics > 0, work.quantized > 0) == (statistics, quantized)


def test_another_model_takes_nothing_from_the_work_dir(tmp_path: Path, work: Work) -> None:
    compile_stack(**STACK, work_dir=tmp_path)
    work.reset()
    other = stack()
    with torch.no_grad():
        other.norm.weight.add_(1)
    compile_stack(other, **STACK, work_dir=tmp_path)
    assert work.statistics > 0
    assert work.quantized == 3


def test_a_work_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="for work files"):
        compile_stack(**STACK, work_dir=tmp_path / "file" / "work")


def test_a_damaged_work_file_is_made_again_or_refused_in_words(tmp_path: Path) -> None:
    compile_stack(**STACK, work_dir=tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with contextlib.suppress(lowra.LowraError):
        compile_stack(**STACK, work_dir=tmp_path)


def test_a_compile_removes_its_work_files_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the garbage collector, which would warn of it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gc.disable()
    try:
        compiled = compile_stack(**STACK)
        assert not list(tmp_path.glob("lowra-*"))
    finally:
        gc.enable()
    assert output(compiled, {"x": X}).shape == (2, 8, 32)


def test_a_compile_that_fails_removes_its_work_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Work
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    work.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        compile_stack(**STACK)
    assert not list(tmp_path.glob("lowra-*"))
