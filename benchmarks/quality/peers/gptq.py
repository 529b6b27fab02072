"""GPTQ with groups of 64, calibrated on the benchmark's text (package gptqmodel, its defaults)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.quality.peers.interface import Peer, Quantized
from benchmarks.quality.peers.storage import gptq_bits
from benchmarks.quality.protocol import Task

GROUP = 64


def quantize(task: Task, settings: Mapping[str, Any]) -> Quantized:
    """Quantize a saved copy of the model with gptqmodel and unpack what it stores."""
    from gptqmodel import GPTQModel, QuantizeConfig

    width, group = settings["bits"], settings["group"]
    config = QuantizeConfig(
        bits=width, group_size=group, sym=settings["symmetric"], offload_to_disk=False, device="cpu"
    )
    text = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)}
            for row in task.calibration]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=task.work_dir) as folder:
        task.model.save_pretrained(folder)  # type: ignore[operator]
        task.tokenizer.save_pretrained(folder)
        quantized = GPTQModel.load(folder, config, device="cpu")
        quantized.quantize(text, batch_size=1)
        weights = unpacked(quantized.model, task, Path(folder).name)
    shapes = [site.weight.shape for site in task.sites.values()]
    return Quantized(weights, sum(gptq_bits(n, k, width, group) for n, k in shapes))


def unpacked(model: nn.Module, task: Task, folder: str) -> dict[str, Tensor]:
    """Dequantised weights [n, k] of gptqmodel's layers, by site."""
    weights = {}
    for name, site in task.sites.items():
        layer = model.get_submodule(name)
        if not hasattr(layer, "dequantize_weight"):
            raise RuntimeError(f"gptqmodel left {name} in {folder} as it was: {type(layer)}")
        layer.post_init() if not hasattr(layer, "wf_unsqueeze_zero") else None
        dense = layer.dequantize_weight().detach().T
        weights[name] = dense[: site.out_features, : site.in_features]
    return weights


PEER = Peer(
    name="gptq",
    title="GPTQ",
    packages=("gptqmodel",),
    settings={
        f"gptq-{bits}": {"bits": bits, "group": GROUP, "symmetric": True} for bits in (4, 3, 2)
    },
    quantize=quantize,
)
