"""HQQ at 4, 3, 2 and 1 bits, groups of 64, no calibration (package hqq).

Both groupings: along a row's columns (`axis` 1, what its fast kernels want) and across them
(`axis` 0, which its authors find better at low widths).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.quality.peers.interface import Peer, Quantized
from benchmarks.quality.peers.storage import hqq_bits
from benchmarks.quality.protocol import Task

GROUP = 64


def quantize(task: Task, settings: Mapping[str, Any]) -> Quantized:
    from hqq.core.quantize import Quantizer

    width, group, axis = settings["bits"], settings["group"], settings["axis"]
    weights, bits = {}, 0
    for name, site in task.sites.items():
        n, k = site.weight.shape
        codes, meta = Quantizer.quantize(
            site.weight.detach(), nbits=width, group_size=group, axis=axis, device="cpu",
            compute_dtype=torch.float16,
        )  # fmt: skip
        meta["compute_dtype"] = torch.float16
        codes, meta = Quantizer.to_inplace(codes, meta, "cpu")
        stored = hqq_bits(n, k, width, group, axis)
        if stored != _bits_of(codes, meta["scale"], meta["zero"]):
            raise RuntimeError(f"hqq packs {name} in another way than the benchmark counts")
        weights[name], bits = Quantizer.dequantize(codes, meta).reshape(n, k), bits + stored
    return Quantized(weights, bits)


def _bits_of(*tensors: torch.Tensor) -> int:
    return sum(8 * t.numel() * t.element_size() for t in tensors)


PEER = Peer(
    name="hqq",
    title="HQQ",
    packages=("hqq",),
    settings={
        f"hqq-{bits}-axis{axis}": {"bits": bits, "group": GROUP, "axis": axis}
        for bits in (4, 3, 2, 1)
        for axis in (1, 0)
    },
    quantize=quantize,
)
