"""A tuned model: norms of its own in the view, all in the checkpoint, the dense one untouched."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import lowra
from lowra.compiler.errors import CalibrationError, CaptureError
from lowra.runtime.module_view import build_module_view
from tests import models
from tests.runtime.compiled_models import SMALL, Case, compile_case, output

TUNE: dict[str, Any] = {
    **SMALL, "bit_budget": 3, "tune": "full", "tune_steps": 6, "tune_model_steps": 4,
    "tune_batch_tokens": 64,
}  # fmt: skip
NORM = "model.layers.0.input_layernorm.weight"


@functools.cache
def tuned() -> Case:
    return compile_case(models.tiny_llama, **TUNE)


def test_the_view_has_norms_of_its_own_and_the_dense_model_keeps_its() -> None:
    case = tuned()
    program = cast("Any", case.compiled).lowra.program
    norm = program.tensors[NORM] * 2
    changed = replace(program, tensors=program.tensors | {NORM: norm}, replaced={NORM: norm})
    view = dict(build_module_view(case.dense, changed).named_parameters())
    assert torch.equal(view[NORM], norm) and not view[NORM].requires_grad
    state = case.dense.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in case.before.items())


def test_both_views_give_the_same() -> None:
    case = tuned()
    session = lowra.Session(case.compiled)
    assert torch.allclose(session(**case.inputs), output(case.compiled, case.inputs), atol=1e-5)


def test_the_report_tells_what_tuning_did() -> None:
    report = cast("Any", tuned().compiled).lowra.report["tuning"]
    assert [block["name"] for block in report["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert all(block["after"] <= block["before"] for block in report["blocks"])
    assert report["kl"]["after"] <= report["kl"]["before"]
    assert report["kl_with_adapter"]["after"] <= report["kl_with_adapter"]["before"]


def test_a_tuned_model_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    case = tuned()
    loaded = lowra.load(lowra.save(case.compiled, tmp_path / "tuned"))
    assert torch.equal(output(loaded, case.inputs), output(case.compiled, case.inputs))


def test_tuning_without_data_or_a_held_out_part_is_refused_before_any_work() -> None:
    with pytest.raises(CalibrationError, match="tuning needs calibration data"):
        compile_case(models.tiny_bert, **{**TUNE, "tune": "blocks"})
    with pytest.raises(CalibrationError, match="is one window"):
        compile_case(models.tiny_llama, **{**TUNE, "calibration_tokens": 32})


def test_a_model_without_next_tokens_is_tuned_by_blocks_only() -> None:
    data = torch.randint(3, models.VOCAB, (8, 32))
    with pytest.raises(CaptureError, match="use tune='blocks'"):
        compile_case(models.tiny_bert, calibration=data, **TUNE)
