"""finetune stops: at the step that goes wrong, and where the loss gets no better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowra.compiler.errors import TrainingError
from tests.workflows.finetune_runs import factors, run, student

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


def poisoned(step: int) -> Any:
    """A student whose loss is no number in the forward of this step."""
    model, seen = student(), []

    def poison(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if module.training:
            seen.append(1)
        return output * float("nan") if module.training and len(seen) >= step else output

    model.lm_head.register_forward_hook(poison)
    return model


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_change(tmp_path: Path) -> None:
    model = poisoned(step=13)
    with pytest.raises(TrainingError, match="the loss is nan at step 13; .* as step 12 left"):
        run(model, tmp_path, eval_share=0, max_steps=20)
    kept = load_file(tmp_path / "checkpoints" / "checkpoint-12" / "model.safetensors")
    assert factors(model)
    for name, factor in factors(model).items():
        assert torch.equal(factor, kept[name]), name


def test_a_gradient_that_is_no_number_stops_the_run_too(tmp_path: Path) -> None:
    model = student()
    before = {name: p.clone() for name, p in factors(model).items()}
    factor = next(p for n, p in model.named_parameters() if n.endswith("lora_B"))
    factor.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match="gradient of .*lora_B is not finite at step 1"):
        run(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in factors(model).items())


def test_early_stopping_stops_where_the_loss_gets_no_better(tmp_path: Path) -> None:
    """At a rate that moves nothing, the evaluation of step 2 stays the best."""
    report = run(student(), tmp_path, rate=1e-30, max_steps=40, patience=2).report
    assert len({e["loss"] for e in report["evaluations"]}) == 1
    assert report["stopped_early"] and report["steps"] == 6
    assert report["best"]["step"] == 2
