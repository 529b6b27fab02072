"""LoRA dropout: in training alone, on the adapter's input alone, and kept by a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch

import lowra
from lowra.runtime.module_view import quantized_linears
from tests.runtime.compiled_models import stack


def dropping() -> Any:
    example = (torch.randn(4, 64),)
    return lowra.compile(
        stack(), bit_budget=4, calibration=[example], example=example, rank=4, lora_dropout=0.5
    )


def test_evaluation_drops_nothing_and_training_drops_anew_each_time() -> None:
    model, x = dropping(), torch.randn(4, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_only_the_adapters_input_is_dropped_as_in_peft() -> None:
    """y = W x + bias + scaling B A dropout(x), with the very elements that torch drops."""
    layer, x = cast("Any", dropping()).first, torch.randn(4, 64)
    layer.train()
    torch.manual_seed(1)
    found = layer(x)
    torch.manual_seed(1)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = x @ layer.weight.T + layer.bias
    expected = expected + layer.scaling * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_model_comes_back_with_its_dropout(tmp_path: Path) -> None:
    loaded = lowra.load(lowra.save(dropping(), tmp_path / "saved"), stack())
    assert {layer.dropout for layer in quantized_linears(loaded).values()} == {0.5}


def test_an_adapters_config_tells_its_dropout_as_peft_reads_it(tmp_path: Path) -> None:
    model = dropping()
    saved = lowra.save(model, tmp_path / "saved"), lowra.save_adapter(model, tmp_path / "adapter")
    for folder in saved:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["lora_dropout"] == 0.5
