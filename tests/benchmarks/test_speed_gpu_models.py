"""The benchmark of whole models without a GPU: what it builds, writes and trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.speed import gpu_models
from lowra.runtime.modules import QuantizedLinear

SHAPES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 200, "tie_word_embeddings": False, "num_hidden_layers": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["bf16", "lowra 2", "lowra 1.5"])
def test_a_writer_writes_what_generate_writes(kind: str) -> None:
    torch.manual_seed(0)
    model = gpu_models.built(kind, SHAPES, "cpu")
    packed = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    assert len(packed) == (0 if kind == "bf16" else 14) and model.dtype == torch.bfloat16
    assert len({layer.codes.data_ptr() for layer in packed}) == len(packed)
    writer = gpu_models.Writer(model, batch=2, prompt=9, room=8)
    written = [writer.token.clone()] + [writer().clone() for _ in range(5)]
    prompt = torch.randint(200, (2, 9), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(torch.cat(written, 1), wanted[:, 9:])


@pytest.mark.parametrize("kind", ["bf16", "lowra 1.5"])
def test_a_step_trains_adapters_alone(kind: str) -> None:
    pytest.importorskip("peft")
    row = gpu_models.stepping(kind, SHAPES, tokens=12, steps=1, device="cpu")
    assert set(row) == {"seconds", "peak_bytes", "held_bytes"}
    model = gpu_models.with_adapters(kind, gpu_models.built(kind, SHAPES, "cpu"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_an_error_is_a_result_and_what_is_measured_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(gpu_models, "write_results", lambda name, data: written.update(data))
    found: dict[str, Any] = {"steps": {"bf16": {"seconds": 1.0}}}

    def fail() -> None:
        raise torch.OutOfMemoryError("no room")

    gpu_models._measure(found, "steps", "nf4", fail)
    assert written["steps"]["bf16"] == {"seconds": 1.0}
    assert "no room" in written["steps"]["nf4"]["error"]
