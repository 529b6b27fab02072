"""Which adapters lie in a pool's pages, who uses them, and which leaves when room is needed.

Not safe by itself: the pool calls it under its lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from lowra.compiler.adapter_delta import AdapterDelta, Basis, Shared, SiteDelta, runs_of
from lowra.compiler.adapter_pages import CHUNK, POST
from lowra.compiler.errors import AdapterError
from lowra.runtime.serving.pages import Image, Memory, lay_out


@dataclass
class _Held:
    """A basis in memory: its pages, where its parts lie in `lines`, how many adapters need it."""

    ids: list[int]
    lines: Tensor
    places: dict[str, tuple[int, int]]
    needed: int = 0


@dataclass(frozen=True)
class _Site:
    """What an adapter changes at a layer. rescales: whether it has a POST."""

    chunks: Tensor
    scaling: float
    rank: int
    rescales: bool


_NOTHING = _Site(torch.zeros(0, len(CHUNK), dtype=torch.int32), 0.0, 0, False)


@dataclass
class _Resident:
    """An adapter in memory; what it changes by module name."""

    ids: list[int]
    sites: dict[str, _Site]
    bases: tuple[str, ...]
    uses: int = 0


@dataclass
class LaidOut:
    """An adapter and the bases that it needs, as pages that are not placed yet."""

    own: Image
    bases: dict[str, Image] = field(default_factory=dict[str, Image])


class Residents:
    """`count` pages of `size` words, and the adapters in them; the least recently used first."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self._memory = Memory(count, size, device)
        self._held: dict[str, _Resident] = {}
        self._bases: dict[str, _Held] = {}
        self._pinned = set[str]()
        self.loads = self.evictions = 0

    @property
    def words(self) -> Tensor:
        return self._memory.words

    @property
    def page_bytes(self) -> int:
        return 4 * self._memory.size

    @property
    def budget_bytes(self) -> int:
        return self._memory.count * self.page_bytes

    @property
    def used_bytes(self) -> int:
        return (self._memory.count - self._memory.free) * self.page_bytes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._held)

    @property
    def pinned(self) -> tuple[str, ...]:
        return tuple(sorted(self._pinned))

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def bytes_of(self, name: str) -> int:
        return len(self._held[name].ids) * self.page_bytes if name in self._held else 0

    def in_use(self, name: str) -> bool:
        return name in self._held and self._held[name].uses > 0

    def touch(self, name: str, hold: bool) -> bool:
        """Make an adapter the most recently used one; False where it is not in memory."""
        found = self._held.pop(name, None)
        if found is None:
            return False
        self._held[name] = found
        found.uses += hold
        return True

    def release(self, name: str) -> None:
        if name in self._held:
            self._held[name].uses -= 1

    def pin(self, name: str, stays: bool) -> None:
        """Never evict an adapter, or let it go again."""
        (self._pinned.add if stays else self._pinned.discard)(name)

    def laid_out(self, name: str, delta: AdapterDelta) -> LaidOut:
        """An adapter as pages. Raises AdapterError for one that no emptied pool could hold."""
        size = self._memory.size
        own = (
            ((site.name, role), runs_of(part))
            for site in delta.sites.values()
            for role, part in site.parts.items()
            if not isinstance(part, Shared)
        )
        found = LaidOut(
            lay_out(own, size), {id: _basis_image(b, size) for id, b in delta.bases.items()}
        )
        need = len(found.own.pages) + sum(len(image.pages) for image in found.bases.values())
        if need > self._memory.count:
            raise AdapterError(
                f"adapter {name!r} takes {need} pages of {self.page_bytes:,} bytes, the whole pool "
                f"has {self._memory.count}: make the pool larger, or compress the adapter"
            )
        return found

    def put(self, name: str, delta: AdapterDelta, image: LaidOut, beside: Sequence[str]) -> None:
        """Place an adapter, once room is made. `beside`: those of its batch, for the message.

        Raises AdapterError, with nothing changed but what was evicted, where all else is pinned or
        in use.
        """
        if name in self._held:
            return
        # Held by name first: making room could free the bases that it shares with others.
        for id in delta.bases:
            if id in self._bases:
                self._bases[id].needed += 1
        missing = {id: pages for id, pages in image.bases.items() if id not in self._bases}
        try:
            need = len(image.own.pages) + sum(len(pages.pages) for pages in missing.values())
            self._make_room(name, need, beside)
        except AdapterError:
            for id in delta.bases:
                if id not in missing:
                    self._leave(id)
            raise
        for id, pages in missing.items():
            self._bases[id] = _held(self._memory, pages)
        ids = self._memory.put(image.own)
        lines = image.own.placed(ids)
        sites = {
            site.name: _Site(
                self._chunks(site, lines, image.own), site.scaling, site.rank, POST in site.parts
            )
            for site in delta.sites.values()
        }
        self._held[name] = _Resident(ids, sites, tuple(delta.bases))
        self.loads += 1

    def _chunks(self, site: SiteDelta, lines: Tensor, image: Image) -> Tensor:
        found: list[Tensor] = []
        for role, part in site.parts.items():
            if not isinstance(part, Shared):
                begin, end = image.places[site.name, role]
                found.append(lines[begin:end])
                continue
            basis = self._bases[part.basis.id]
            begin, end = basis.places[part.name]
            shared = basis.lines[begin:end].clone()
            shared[:, CHUNK.index("role")] = role
            found.append(shared)
        return torch.cat(found)

    def _make_room(self, name: str, need: int, beside: Sequence[str]) -> None:
        for key in [key for key, found in self._held.items() if not found.uses]:
            if self._memory.free >= need:
                break
            if key not in self._pinned:
                self.drop(key)
                self.evictions += 1
        if self._memory.free >= need:
            return
        others = [other for other in beside if other != name]
        batch = f" beside {len(others)} others of its batch" if others else ""
        pinned, total = self.pinned, self._memory.count
        raise AdapterError(
            f"no room for adapter {name!r}{batch}: it takes {need} pages of {self.page_bytes:,} "
            f"bytes, {self._memory.free} of {total} are free and none can be freed; "
            f"{len(pinned)} adapters are pinned{_named(pinned)}: unpin some, make the pool larger, "
            "or serve fewer adapters at a time"
        )

    def drop(self, name: str) -> None:
        """Give an adapter's pages back, and those of bases that no other needs."""
        found = self._held.pop(name, None)
        if found is None:
            return
        self._memory.give_back(found.ids)
        for id in found.bases:
            self._leave(id)

    def _leave(self, id: str) -> None:
        self._bases[id].needed -= 1
        if not self._bases[id].needed:
            self._memory.give_back(self._bases.pop(id).ids)

    def tables(self, names: Sequence[str], site: str) -> tuple[Tensor, Tensor, Tensor, int, bool]:
        """chunks, bounds, scalings, rank of `apply_adapters` for a layer; whether one rescales."""
        found = [self._held[name].sites.get(site, _NOTHING) for name in names]
        bounds = [0, *accumulate(len(one.chunks) for one in found)]
        return (
            torch.cat([one.chunks for one in found]) if len(found) > 1 else found[0].chunks,
            torch.tensor(bounds, dtype=torch.int32),
            torch.tensor([one.scaling for one in found]),
            max(one.rank for one in found),
            any(one.rescales for one in found),
        )


def _basis_image(basis: Basis, size: int) -> Image:
    return lay_out((((name, 0), runs) for name, runs in basis.parts.items()), size)


def _held(memory: Memory, image: Image) -> _Held:
    ids = memory.put(image)
    places = {name: where for (name, _), where in image.places.items()}
    return _Held(ids, image.placed(ids), places, needed=1)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f" ({shown}{', ...' if len(names) > 3 else ''})" if names else ""
