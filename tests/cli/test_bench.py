"""lowra bench: products beside dense ones, and writing beside the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowra.compiler.errors import LowraError
from lowra.workflows.bench import bench_model, bench_shapes


def test_a_compiled_model_is_measured_beside_its_original(
    lowra: Any, checkpoint: Path, dense: Path
) -> None:
    before = torch.get_num_threads()
    data = lowra.json(
        "bench", checkpoint, "--reference", dense, "--tokens", 1, "--seconds", 0, "--threads", 1,
        "--dtype", "float32",
    )  # fmt: skip
    assert torch.get_num_threads() == before and data["threads"] == 1
    for line in data["products"]:
        assert line["m"] == 1 and line["seconds"] > 0 and line["read_rate"] > 0
        assert line["ratio"] == pytest.approx(line["dense_seconds"] / line["seconds"])
        assert line["bytes"] == pytest.approx(line["bits"] * line["n"] * line["k"] / 8, abs=1)
    assert set(data["tokens_per_second"]) == {"compressed", "reference"}


def test_shapes_are_measured_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowra.workflows.bench.COLD_BYTES", 1 << 16)
    lines = list(bench_shapes((1, 70), torch.bfloat16, 0.0, shapes=((64, 288),)))
    assert [(line.n, line.k, line.m) for line in lines] == 4 * [(64, 288, 1), (64, 288, 70)]
    assert [line.bits for line in lines] == sorted(line.bits for line in lines)


def test_a_dense_model_has_nothing_to_measure() -> None:
    with pytest.raises(LowraError, match="no packed weight"):
        list(bench_model(torch.nn.Linear(4, 4), (1,), 0.0))
