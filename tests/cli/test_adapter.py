"""lowra adapter merge: the cost first, and nothing written until it is told to."""

from __future__ import annotations

import json
from typing import cast

import pytest
import torch

import lowra as library
from lowra.runtime.module_view import quantized_linears
from lowra.workflows.models import load_model

SHORT = ["--windows", 2, "--context", 32]
pytestmark = pytest.mark.usefixtures("no_graph")


@pytest.fixture(scope="session")
def adapter(compiled, tmp_path_factory):
    """An adapter that was trained on the compiled model, as far as its files tell."""
    model = library.load(compiled[0])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in quantized_linears(model).values():
            cast("torch.Tensor", layer.lora_B).normal_(std=0.5)
    return library.save_adapter(model, tmp_path_factory.mktemp("adapters") / "trained")


def test_a_merge_that_is_not_told_says_what_it_would_cost(lowra, checkpoint, adapter, tmp_path):
    out = tmp_path / "merged"
    done = lowra("adapter", "merge", checkpoint, adapter, "--out", out, *SHORT)
    assert done.exit_code == 9, done.output
    assert "nats of KL per token, over 62 tokens" in done.stdout
    assert "nothing was written: merging costs 0." in done.stderr
    assert "add --yes" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_merge_that_is_told_writes_a_compiled_model_without_an_adapter(
    lowra, checkpoint, adapter, tmp_path
):
    out = tmp_path / "merged"
    data = lowra.json("adapter", "merge", checkpoint, adapter, "--out", out, "--yes", *SHORT)
    assert data["written"] and 0 < data["kl"] < data["adapter_kl"]
    merged, tokenizer = load_model(out)
    assert tokenizer is not None
    assert all(layer.rank == 0 for layer in quantized_linears(merged).values())
    assert not (out / "adapter_model.safetensors").exists()


def test_a_dense_merge_writes_a_hugging_face_model(lowra, checkpoint, adapter, tmp_path):
    out = tmp_path / "merged"
    words = ("adapter", "merge", checkpoint, adapter, "--out", out, "--dense", *SHORT)
    data = lowra.json(*words, code=9)
    assert data["kl"] == pytest.approx(0, abs=1e-5) and not data["written"]
    assert not list(tmp_path.iterdir())
    assert lowra.json(*words, "--yes")["written"]
    merged, _ = load_model(out, dtype=torch.float32)
    model = library.load_adapter(library.load(checkpoint), adapter)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("base", "other", "code", "said"),
    [
        ("dense", "adapter", 9, "not compiled by lowra"),
        ("checkpoint", "dense", 9, "no adapter_config.json"),
        ("nowhere/at/all", "adapter", 8, "no model at"),
    ],
)
def test_what_cannot_be_merged_is_refused(lowra, request, tmp_path, base, other, code, said):
    sources = [request.getfixturevalue(n) if "/" not in n else n for n in (base, other)]
    done = lowra("adapter", "merge", *sources, "--out", tmp_path / "merged", *SHORT)
    assert done.exit_code == code, done.output
    assert said in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_before_anything_is_loaded(lowra, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    done = lowra("adapter", "merge", "no/such/model", "nor/adapter", "--out", tmp_path)
    assert done.exit_code == 7, done.output


def test_an_adapter_of_another_base_needs_to_be_told(lowra, checkpoint, adapter, dense, tmp_path):
    other = tmp_path / "other"
    lowra.json("compile", dense, other, "--bits", 4, "--calibration-tokens", 128, "--context", 32)
    words = ("adapter", "merge", other, adapter, "--out", tmp_path / "merged", *SHORT)
    done = lowra(*words)
    assert done.exit_code == 9
    assert "another" in done.stderr.splitlines()[-1]
    assert lowra.json(*words, "--any-base", "--dense", code=9)["kl"] < 1e-4
