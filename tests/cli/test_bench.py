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


def test_tuning_without_a_gpu_is_refused(lowra: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = lowra.json("bench", "--tune", code=1)
    assert "no CUDA device" in found["error"]
    told = lowra("bench", "--tune", "--seconds", 1)
    assert told.exit_code == 2 and "--tune" in told.output


def test_tuning_shows_the_fastest_blocks(
    lowra: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowra.backends.triton.schedule import UNPACKED
    from lowra.workflows import tune_kernels

    def tune(weights: Any, tokens: tuple[int, ...], dtype: torch.dtype) -> Any:
        for weight in weights:
            case = f"{weight.n}x{weight.k} {dtype} {tokens}"
            yield tune_kernels.Tuned(case, UNPACKED, 2.0, UNPACKED, 3.0, 4, 1)

    monkeypatch.setattr(tune_kernels, "require_device", lambda: "A GPU")
    monkeypatch.setattr(tune_kernels, "tune", tune)
    data = lowra.json("bench", checkpoint, "--tune", "--tokens", 4)
    assert data["device"] == "A GPU" and len(data["tuned"]) > 1
    assert data["tuned"][0]["choice"] == {"unpacked": True}
    assert data["tuned"][0]["case"].endswith("torch.bfloat16 (4,)")
    assert "kernels tuned on A GPU" in lowra("bench", checkpoint, "--tune").stdout


def test_shapes_are_measured_without_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowra.workflows.bench.COLD_BYTES", 1 << 16)
    lines = list(bench_shapes((1, 70), torch.bfloat16, 0.0, shapes=((64, 288),)))
    assert [(line.n, line.k, line.m) for line in lines] == 4 * [(64, 288, 1), (64, 288, 70)]
    assert [line.bits for line in lines] == sorted(line.bits for line in lines)


def test_a_dense_model_has_nothing_to_measure() -> None:
    with pytest.raises(LowraError, match="no packed weight"):
        list(bench_model(torch.nn.Linear(4, 4), (1,), 0.0))
