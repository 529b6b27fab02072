"""AutoRound: rounding learned by signed gradients, block by block (package auto-round).

Its own defaults but for the calibration: the benchmark's text as 128 windows of 256 tokens (the
same 32768 tokens; shorter windows are what makes 200 iterations affordable on two cores). At 2 bits
two rows: the scheme's default, symmetric with the algorithm extension that its manual recommends
there, and asymmetric without.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from benchmarks.quality.peers.interface import Peer, Quantized
from benchmarks.quality.peers.storage import gptq_bits
from benchmarks.quality.protocol import Task, sites_of

GROUP, ITERATIONS, BATCH, CONTEXT = 64, 200, 8, 256


def quantize(task: Task, settings: Mapping[str, Any]) -> Quantized:
    """Tune with auto-round and take the dequantised weights that it leaves in the model."""
    from auto_round import AutoRound

    windows = task.calibration.reshape(-1, settings["context"])
    rounding = AutoRound(
        copy.deepcopy(task.model), task.tokenizer, bits=settings["bits"],
        group_size=settings["group"], sym=settings["symmetric"], iters=settings["iterations"],
        dataset=list(windows.split(BATCH)), nsamples=len(windows), seqlen=settings["context"],
        batch_size=BATCH, device_map="cpu", enable_torch_compile=False,
        enable_alg_ext=settings["extension"],
    )  # fmt: skip
    tuned, layers = rounding.quantize()
    weights = {name: site.weight.detach() for name, site in sites_of(tuned).items()}
    untouched = [n for n, w in weights.items() if w.equal(task.sites[n].weight)]
    if untouched:
        raise RuntimeError(f"auto-round left {len(untouched)} layers as they were: {untouched[0]}")
    shapes = [site.weight.shape for site in task.sites.values()]
    bits = sum(gptq_bits(n, k, settings["bits"], settings["group"]) for n, k in shapes)
    return Quantized(weights, bits, facts={"layers": len(layers)})


def _settings(bits: int, *, symmetric: bool, extension: bool = False) -> dict[str, Any]:
    return {
        "bits": bits, "group": GROUP, "symmetric": symmetric, "extension": extension,
        "iterations": ITERATIONS, "samples": 128, "context": CONTEXT, "batch": BATCH,
    }  # fmt: skip


PEER = Peer(
    name="autoround",
    title="AutoRound",
    packages=("auto-round",),
    settings={
        "autoround-2-asym": _settings(2, symmetric=False),
        "autoround-2-sym-ext": _settings(2, symmetric=True, extension=True),
        "autoround-3-sym": _settings(3, symmetric=True),
        "autoround-4-sym": _settings(4, symmetric=True),
    },
    quantize=quantize,
)
