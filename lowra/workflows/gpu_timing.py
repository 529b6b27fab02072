"""How long work takes on a CUDA device: graphs of it, replayed by turns, over cold weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.storage import PackedWeight

COLD_BYTES = 256 << 20
"""Weights in turn are at least so large together: larger than the cache of any device."""
MOST_COPIES = 64
TURNS = 7

Run = Callable[[int], object]


def device_copies(weight: PackedWeight) -> list[tuple[Any, ...]]:
    """The op arguments of equal weights on the device, together larger than its cache."""
    codes, *rest = (a.cuda() if isinstance(a, Tensor) else a for a in weight.op_args())
    assert isinstance(codes, Tensor)
    count = max(2, min(MOST_COPIES, -(-COLD_BYTES // (codes.numel() * 4))))
    return [(codes.clone(), *rest) for _ in range(count)]


def graph_of(run: Run, count: int) -> torch.cuda.CUDAGraph:
    """`run(0)` to `run(count - 1)` as one graph; kernels are built before."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for turn in range(2):
            run(turn)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for turn in range(count):
            run(turn)
    return graph


def seconds_of(runs: dict[str, tuple[Run, int]]) -> dict[str, float]:
    """Least seconds of one product of each, by turns; a run comes with its number of copies."""
    graphs = {name: (graph_of(run, count), count) for name, (run, count) in runs.items()}
    best = dict.fromkeys(graphs, float("inf"))
    for _ in range(TURNS):
        for name, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            best[name] = min(best[name], start.elapsed_time(end) / 1e3 / count)
    return best
