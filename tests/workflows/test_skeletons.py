"""Planning from shapes: no weights are read, and the plan is that of the loaded model."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig

import lowra
from lowra.compiler.errors import ModelError
from lowra.workflows.skeletons import load_skeleton
from tests import models


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a config of LLaMA-2-7B's shapes, and nothing else."""
    folder = tmp_path_factory.mktemp("llama-2-7b")
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def test_seven_billion_weights_are_planned_in_little_time_and_memory(llama_7b: Path) -> None:
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = lowra.plan(llama_7b, bit_budget=2)
    assert time.process_time() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert plan.weights == 6_476_005_376
    assert plan.dense_bytes == 2 * plan.weights
    assert len(plan.sites) == 7 * 32
    assert plan.largest_bytes == plan.weights // 4
    embeddings = 2 * 2 * 32000 * 4096 + 2 * 65 * 4096
    assert plan.file_bytes == plan.largest_bytes + plan.adapter_bytes + embeddings
    assert plan.lowest_bits < 1.05 and plan.fingerprint == ""


def test_estimates_say_how_they_were_obtained(llama_7b: Path) -> None:
    found = lowra.plan(llama_7b, bit_budget=2).estimates
    assert found is not None
    names = [stage["name"] for stage in found["stages"]]
    assert names[:2] == ["capture", "calibration"] and names[-1] == "rewrite-linears"
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"]))
    assert found["peak_bytes"] == max(s["peak_bytes"] for s in found["stages"]) > 13e9
    assert "benchmarks/results/compile.json" in found["obtained"]
    assert 0.1175 < found["error"]["relative_error"] < 0.363  # 2 bits less codebooks and tags
    assert "Gaussian" in found["error"]["obtained"]
    paper = lowra.plan(llama_7b, bit_budget=2, preset="lowra").estimates
    assert paper is not None
    assert {"calibration", "collect-statistics"}.isdisjoint(s["name"] for s in paper["stages"])


def test_the_plan_from_a_config_is_that_of_the_loaded_model(tmp_path: Path) -> None:
    for tied in (False, True):
        model = models.tiny_llama(tied=tied)
        model.save_pretrained(tmp_path / str(tied))
        loaded = lowra.plan(model.bfloat16(), bit_budget=3).to_dict()
        read = lowra.plan(tmp_path / str(tied), bit_budget=3).to_dict()
        assert read.pop("fingerprint") == "" != loaded.pop("fingerprint")
        assert read == json.loads(json.dumps(loaded)) or read == loaded


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for wrong in (tmp_path / "missing", tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ModelError):
            load_skeleton(wrong)
