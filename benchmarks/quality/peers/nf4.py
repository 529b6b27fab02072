"""NF4 of bitsandbytes, blocks of 64, plain and with double quantization of its absmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.quality.peers.interface import Peer, Quantized
from benchmarks.quality.peers.storage import nf4_bits
from benchmarks.quality.protocol import Task

BLOCK = 64


def quantize(task: Task, settings: Mapping[str, Any]) -> Quantized:
    weights, bits = {}, 0
    for name, site in task.sites.items():
        weights[name], state = nf4_round_trip(site.weight.detach(), settings["double"])
        bits += nf4_bits(*site.weight.shape, state.blocksize, state.nested)
    return Quantized(weights, bits)


def nf4_round_trip(weight: Tensor, double: bool) -> tuple[Tensor, Any]:
    """`weight` through 4-bit codes and back, in its dtype, and bitsandbytes' own state."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=double
    )
    return functional.dequantize_4bit(codes, state), state


PEER = Peer(
    name="nf4",
    title="bitsandbytes NF4",
    packages=("bitsandbytes",),
    settings={
        "nf4": {"block": BLOCK, "double": False},
        "nf4-double": {"block": BLOCK, "double": True},
    },
    quantize=quantize,
)
