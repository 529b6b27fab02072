"""What a pool knows of each adapter, and what it tells of itself."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from lowra.runtime.serving.sources import Source


@dataclass
class Registered:
    """An adapter that is registered: all of it that is always in memory."""

    source: Source
    kind: str
    size_bytes: int
    on_top: bool
    seal: str
    coming: Future[None] | None = None


@dataclass(frozen=True)
class PoolStatus:
    """What a pool holds. resident: names, the least recently used first."""

    registered: int
    resident: tuple[str, ...]
    pinned: tuple[str, ...]
    budget_bytes: int
    used_bytes: int
    page_bytes: int
    loads: int
    evictions: int
