"""Training end to end stops early, and where it is cut off goes on to the same end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lowra.passes import TuneModel
from lowra.passes.tuning import model_training
from lowra.passes.tuning.model_training import Course
from tests.passes.tuned_programs import quantized, same, tuned

DIVERGING = TuneModel(steps=12, batch_tokens=64, rate=5.0, check=2)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rates of all steps taken from here on."""
    rates: list[float] = []
    step = model_training.Adam.step

    def count(self: Any, rate: float) -> None:
        rates.append(rate)
        step(self, rate)

    monkeypatch.setattr(model_training.Adam, "step", count)
    return rates


def test_two_checks_without_gain_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = counted(monkeypatch)
    tuned(quantized("llama"), DIVERGING)
    assert len(rates) == 4


def test_a_run_cut_off_behind_its_last_check_does_not_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = model_training.write_tensors

    def failing(tensors: Mapping[str, Tensor], path: Path) -> None:
        if path.suffix != ".state":
            raise KeyboardInterrupt
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(model_training, "write_tensors", failing)
        with pytest.raises(KeyboardInterrupt):
            tuned(quantized("llama"), DIVERGING, tmp_path)
    rates = counted(monkeypatch)
    resumed = tuned(quantized("llama"), DIVERGING, tmp_path)
    assert not rates
    assert same(resumed, quantized("llama"))
    assert not list(tmp_path.glob("*.state"))


def test_the_rate_rises_shortly_and_falls_to_nearly_nothing() -> None:
    course = Course("", steps=20, rate=1.0, check=8, seed=0)
    rates = [course.rate_at(step) for step in range(1, 21)]
    assert rates[0] == 0.5 and max(rates) == rates[1]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.01
    assert course.checks == [8, 16, 20]
