"""Memory that outlives a launch, and what a captured graph may hold of it.

A graph is replayed on any stream, beside other graphs and launches, and at its capture nothing
runs. So what launches of one stream share, no graph holds: captured, sums lie in memory of the
graph's own, and every captured launch has counters to itself that were zero before the capture.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lowra.compiler.errors import LowraError

FEWEST_COUNTERS = 4096
ARENA = 1 << 18
"""Counters set aside for graphs at a time, 1 MiB: two thousand captured launches of 128 tiles."""


@dataclass
class Arena:
    """Zeros that captured launches take their counters from, each place once."""

    zeros: Tensor
    used: int = 0

    def take(self, count: int) -> Tensor | None:
        if self.used + count > self.zeros.numel():
            return None
        self.used += count
        return self.zeros[self.used - count : self.used]


_workspaces: dict[tuple[str, torch.device, int], tuple[Tensor, Tensor]] = {}
_arenas: dict[torch.device, list[Arena]] = {}
"""All that there ever were, since graphs go on using them; the last one is in use."""


def workspace(what: str, places: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for `size` sums, and `places` counters that are zero between launches."""
    if capturing(device):
        sums = torch.empty(size, dtype=torch.float32, device=device)
        return sums, _counters_for_a_graph(places, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _workspaces.get((what, device, stream))
    if found is None or found[0].numel() < size or found[1].numel() < places:
        found = (
            outside_graphs(lambda: torch.empty(size, device=device), device),
            _zeros(max(places, FEWEST_COUNTERS), device),
        )
        _workspaces[what, device, stream] = found
        _set_aside(device)
    return found


def _counters_for_a_graph(places: int, device: torch.device) -> Tensor:
    """Of the arena; where it is used up, zeros that every replay writes anew, which takes longer
    and is as right."""
    arenas = _arenas.get(device)
    taken = arenas[-1].take(places) if arenas else None
    return torch.zeros(places, dtype=torch.int32, device=device) if taken is None else taken


def _set_aside(device: torch.device) -> None:
    """Counters for graphs to come, at a launch that is not captured."""
    arenas = _arenas.setdefault(device, [])
    if device.type == "cuda" and (not arenas or arenas[-1].used > ARENA // 2):
        arenas.append(Arena(_zeros(ARENA, device)))


def _zeros(count: int, device: torch.device) -> Tensor:
    return outside_graphs(lambda: torch.zeros(count, dtype=torch.int32, device=device), device)


def capturing(device: torch.device) -> bool:
    """Whether launches on `device` are written down for a graph, and do not run."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def outside_graphs(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A tensor to keep, complete, in memory that is set aside for no graph. `torch.compile` warms
    its graphs up in memory that it gives to others later; that is by thread, so another one makes
    it. Raises LowraError within a capture, where nothing can be made."""
    if device.type != "cuda":
        return make()
    if capturing(device):
        raise LowraError(
            f"a CUDA graph on {device} captures a product that has not run before: call it once "
            "with inputs of this shape and dtype, then capture it"
        )
    stream = torch.cuda.current_stream(device)

    def made() -> Tensor:
        with torch.cuda.stream(stream):
            tensor = make()
            stream.synchronize()
            return tensor

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()
