"""GPTQ with groups of 64, calibrated on the benchmark's text (package gptqmodel, its defaults)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.quality.peers.interface import Peer, Quantized
from benchmarks.quality.peers.storage import gptq_bits
from benchmarks.quality.protocol import Task

GROUP = 64


def quantize(task: Task, settings: Mapping[str, Any]) -> Quantized:
    """Quantize a saved copy of the model with gptqmodel and unpack what it stores."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it asks for two, and has one on 2 cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    width, group = settings["bits"], settings["group"]
    config = QuantizeConfig(
        bits=width, group_size=group, sym=settings["symmetric"], offload_to_disk=False, device="cpu"
    )
    text = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)}
            for row in task.calibration]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch):  # it leaves logs where it runs
        dense, stored = Path(scratch) / "dense", Path(scratch) / "stored"
        task.model.save_pretrained(dense)  # type: ignore[operator]
        task.tokenizer.save_pretrained(dense)
        made = GPTQModel.load(str(dense), config)
        made.quantize(text, batch_size=1)
        made.save(str(stored))  # what it leaves in memory has zeros in the file's older form
        loaded = GPTQModel.load(str(stored), device="cpu", backend=BACKEND.TORCH)
        weights = unpacked(loaded.model, task)
    shapes = [site.weight.shape for site in task.sites.values()]
    return Quantized(weights, sum(gptq_bits(n, k, width, group) for n, k in shapes))


def unpacked(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """Dequantised weights [n, k] of gptqmodel's layers, by site."""
    weights = {}
    for name, site in task.sites.items():
        layer = model.get_submodule(name)
        if not hasattr(layer, "dequantize_weight"):
            raise RuntimeError(f"gptqmodel left {name} as it was: {type(layer).__name__}")
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
