"""Models ready to train: one rank-16 adapter at every linear, on bases of different kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lowra
from benchmarks.quality.ours import paper_code_bits
from benchmarks.quality.protocol import Task, with_weights
from lowra.runtime.training import PARTS

RANK = 16


@dataclass(frozen=True)
class Base:
    """A model whose adapters train, in float32, and what its frozen weights store per weight."""

    model: nn.Module
    stored_bits: float


def base_of(name: str, task: Task) -> Base:
    """`original`, `nf4`, `loftq-4`, `loftq-2`, `default BITS` or `lowra BITS`; with ` all` behind
    it, norms, codebooks and scales train too, with ` tuned`, the base is tuned before, and with
    ` plain`, no rows hold trellis codes. Raises ValueError for another name, or a budget that a
    preset cannot keep."""
    kind, bits, *more = *name.split(" "), ""
    makers: Mapping[str, Callable[[], Base]] = {
        "original": lambda: Base(with_lora(copy.deepcopy(task.model)), 16.0),
        "nf4": lambda: _of_peer(task, "nf4", "nf4"),
        "loftq-4": lambda: _of_peer(task, "loftq", "loftq-4"),
        "loftq-2": lambda: _of_peer(task, "loftq", "loftq-2"),
        "default": lambda: _compiled(task, "default", float(bits), more),
        "lowra": lambda: _compiled(task, "lowra", float(bits), more),
    }
    if kind not in makers:
        raise ValueError(f"{name!r} is no base; {', '.join(makers)}")
    return makers[kind]()


def with_lora(model: nn.Module, products: Mapping[str, Tensor] | None = None) -> nn.Module:
    """peft's LoRA on every linear but the head; where `products` [n, k] are given, it starts there
    and not at zero."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", lora_dropout=0.0)
    wrapped: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    if products is not None:
        layers = {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules()}
        for name, product in products.items():
            _start_at(layers[name], product)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


@torch.no_grad()
def _start_at(layer: Any, product: Tensor) -> None:
    u, s, v = torch.linalg.svd(product.float(), full_matrices=False)
    root = s[:RANK].sqrt()
    layer.lora_A["default"].weight.copy_(root[:, None] * v[:RANK])
    layer.lora_B["default"].weight.copy_(u[:, :RANK] * root)


def _of_peer(task: Task, peer: str, setting: str) -> Base:
    """A peer's dequantised weights: what its packed ones compute, at the speed of dense ones."""
    from benchmarks.quality.peers import PEERS

    made = PEERS[peer].quantize(task, PEERS[peer].settings[setting])
    model = with_weights(task.model, made.weights)
    return Base(with_lora(model, made.adapters or None), made.bits / task.weight_count)


def _compiled(task: Task, preset: str, bits: float, more: list[str]) -> Base:
    budget = bits if preset == "default" else paper_code_bits(task.model, bits)
    if budget is None:
        raise ValueError(f"preset {preset} cannot store {bits:g} bits per weight")
    given: dict[str, Any] = {}
    if preset == "default":
        windows, context = task.calibration.shape
        given = {
            "calibration": task.calibration, "context": context,
            "calibration_tokens": windows * context,
            "tune": "full" if "tuned" in more else "none",
            "trellis": False if "plain" in more else None,
        }  # fmt: skip
    model = lowra.compile(
        task.model, bit_budget=budget, preset=preset, rank=RANK, alpha=RANK,
        work_dir=task.work_dir, **given,
    )  # fmt: skip
    lowra.prepare_training(model, PARTS if "all" in more else ("adapters",))
    return Base(model, model.lowra.report["totals"]["stored_bits"])
