"""Adapters made by hand: random factors with a spectrum, and PEFT folders of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowra.adapters.factors import Directions, LowRank, balanced
from lowra.compiler.packed_adapter import PackedSite


def low_rank(
    n: int = 96, k: int = 160, rank: int = 8, decay: float = 0.8, name: str = "site",
    scaling: float = 2.0, seed: int = 0,
) -> LowRank:  # fmt: skip
    """Factors whose product has singular values near 0.3 * decay^i, not in the SVD's basis."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(n, rank))[0], torch.linalg.qr(normal(k, rank))[0]
    sigma = 0.3 * decay ** torch.arange(left.shape[1], dtype=torch.float64)
    mix = torch.linalg.qr(normal(rank, rank))[0]
    b, a = left * sigma.sqrt() @ mix, mix.T @ (right * sigma.sqrt()).T
    return LowRank(name, a.float(), b.float(), scaling)


def product(directions: Directions) -> Tensor:
    return directions.b.double().T @ directions.a.double()


def dense(factors: LowRank) -> Tensor:
    return factors.b.double() @ factors.a.double()


def share(whole: Tensor, rest: Tensor) -> float:
    """|whole - rest|^2 / |whole|^2."""
    return float((whole - rest).square().sum() / whole.square().sum())


def peft_folder(
    folder: Path, sites: list[LowRank] | None = None, *, config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor | None] | None = None,
) -> Path:  # fmt: skip
    """An adapter as peft saves it; `tensors` replaces some by key, or drops them (None)."""
    made = [low_rank(name="layers.0.up"), low_rank(160, 96, name="layers.0.down", seed=1)]
    sites = made if sites is None else sites
    stored: dict[str, Tensor] = {}
    for site in sites:
        stored[f"base_model.model.{site.name}.lora_A.weight"] = site.a.contiguous()
        stored[f"base_model.model.{site.name}.lora_B.weight"] = site.b.contiguous()
    for key, tensor in (tensors or {}).items():
        stored.pop(key, None)
        if tensor is not None:
            stored[key] = tensor
    rank = sites[0].rank
    about = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": [site.name for site in sites], "base_model_name_or_path": "base",
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(about | dict(config or {})))
    return folder


def lengthened(factors: LowRank, site: PackedSite) -> tuple[Tensor, Tensor]:
    """B^ [r, n] and A^ [r, k] of a site in the singular basis, each vector made so long that it is
    as far along the true one: what ours are, and least squares leaves shorter."""
    found = balanced(factors)
    pairs = ((site.b.dequantize(), found.b), (site.a.dequantize(), found.a))
    b, a = (q * (w.square().sum(1) / (q * w).sum(1))[:, None] for q, w in pairs)
    return b, a
