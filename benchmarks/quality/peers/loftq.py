"""LoftQ through peft: codes and a rank-16 adapter by turns, blind to activations, 5 iterations.

peft's `loftq_init` computes on CUDA only, so its loop stands here around its own quantizer and its
own decomposition; at 4 bits it uses bitsandbytes' NF4, at 2 bits its own NFQuantizer, as there.
peft 0.20 removed the 2-bit quantizer: a row at 2 bits needs an older one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.peers.interface import Peer, Quantized
from benchmarks.quality.peers.nf4 import nf4_round_trip
from benchmarks.quality.peers.storage import loftq_bits, nf4_bits
from benchmarks.quality.protocol import Task

BLOCK, RANK, ITERATIONS = 64, 16, 5


def quantize(task: Task, settings: Mapping[str, Any]) -> Quantized:
    width, rank = settings["bits"], settings["rank"]
    round_trip = (lambda w: nf4_round_trip(w, False)[0]) if width == 4 else _normal_float(width)
    weights, adapters, bits, adapter_bits = {}, {}, 0, 0
    for name, site in task.sites.items():
        n, k = site.weight.shape
        weight = site.weight.detach().float()
        weights[name], adapters[name] = alternate(weight, round_trip, rank, settings["iterations"])
        bits += nf4_bits(n, k, BLOCK, False) if width == 4 else loftq_bits(n, k, width, BLOCK)
        adapter_bits += 16 * rank * (n + k)
    return Quantized(weights, bits, adapters, adapter_bits)


def alternate(
    weight: Tensor, round_trip: Callable[[Tensor], Tensor], rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """The quantized base and the low-rank product, both [n, k], as peft's `loftq_init` has them."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    base = product = torch.zeros_like(weight)
    for _ in range(iterations):
        base = round_trip(weight - product)
        factors = _low_rank_decomposition(weight - base, reduced_rank=rank)
        product = factors["L"] @ factors["R"]
    return base, product


def _normal_float(bits: int) -> Callable[[Tensor], Tensor]:
    try:
        from peft.utils.loftq_utils import NFQuantizer
    except ImportError as error:
        raise RuntimeError(
            "peft 0.20 removed the quantizer that LoftQ needs below 4 bits: use peft<0.20"
        ) from error
    quantizer = NFQuantizer(num_bits=bits, device="cpu", method="normal", block_size=BLOCK)

    def round_trip(weight: Tensor) -> Tensor:
        codes, largest, shape = quantizer.quantize_block(weight)
        return quantizer.dequantize_block(codes, largest, shape)

    return round_trip


PEER = Peer(
    name="loftq",
    title="LoftQ",
    packages=("peft", "bitsandbytes"),
    settings={
        f"loftq-{bits}": {"bits": bits, "block": BLOCK, "rank": RANK, "iterations": ITERATIONS}
        for bits in (4, 2)
    },
    quantize=quantize,
)
