"""The GPU benchmark without a GPU: what it writes, and what it measures of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.speed import gpu
from lowra.backends.triton.targets import TARGETS
from lowra.compiler.storage import UNROTATED
from lowra.workflows.bench import random_weight


def test_rows_and_sweep_are_written_and_the_best_blocks_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: dict[str, Any] = {}
    swept = [{"choice": "a", "us": 7.0}, {"choice": "b", "error": "no"}, {"choice": "c", "us": 5.0}]
    monkeypatch.setattr("sys.argv", ["gpu", "--sweep"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(gpu, "bandwidths", lambda: {"read_gb_per_s": 1000.0})
    monkeypatch.setattr(gpu, "measured", lambda *case: iter([{"case": case[0], "ratio": 1.5}]))
    monkeypatch.setattr(gpu, "swept", lambda *case: iter(swept))
    monkeypatch.setattr(gpu, "write_results", lambda name, data: written.update({name: data}))
    monkeypatch.setattr(gpu, "require_kernels", lambda: None)
    gpu.main()
    found = written["speed_gpu"]
    assert len(found["rows"]) == len(gpu.SHAPES) and found["read_gb_per_s"] == 1000
    assert found["sweep"] == swept * len(gpu.SWEPT)
    text = capsys.readouterr().out
    assert text.index("(5.0, 'c')") < text.index("(7.0, 'a')") < text.index("(inf, 'b')")


def test_rows_of_every_width_hold_all_of_its_codes() -> None:
    weight = replace(random_weight(64, 256, 2, 1), rotation=UNROTATED)
    assert [len(row.unique()) for row in weight.dequantize()] == [4] * 32 + [2] * 32


def test_every_case_is_a_shape_of_a_llama_in_every_kind() -> None:
    cases = gpu.every_case()
    assert len(set(cases)) == len(cases) == 10 * len(gpu.KINDS)
    assert {(n, k) for _, n, k, _ in cases} >= {(28672, 8192), (8192, 28672), (11008, 4096)}
    assert {2, 8} < set(gpu.EVERY_TOKENS) > set(gpu.TOKENS)


def test_the_binary_probe_is_one_instruction_of_tensor_cores_and_no_emulation() -> None:
    pytest.importorskip("triton")
    from benchmarks.speed import gpu_binary
    from lowra.backends.triton.static import loop_instructions

    code = gpu_binary.counted(next(t for t in TARGETS if t.name == "sm90"))
    loops = loop_instructions(code)  # the compiler unrolls it by 4, and keeps one for the rest
    products = [sum(n for op, n in loop.items() if op.startswith("BMMA")) for loop in loops]
    assert products and all(n and n % gpu_binary.CHAINS == 0 for n in products)
    assert sum(loops[0].values()) < 1.5 * products[0] and not code.stack_bytes
