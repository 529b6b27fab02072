"""AdapterPool: thousands of adapters by name beside one base, a few of them in memory.

As S-LoRA (arXiv 2311.03285) keeps them: pages of one size, the least recently used adapter leaves
when room is needed. Here a page holds codes as they are stored, so an adapter takes as much as its
file does, whatever its rank, widths and kind.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from lowra.compiler.errors import AdapterError, LowraError, nearest
from lowra.runtime.adapter_view import require_unwrapped
from lowra.runtime.claim import claim
from lowra.runtime.compiled import compiled
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.serving.batch import Batch, Choices, SiteMix, read_choices
from lowra.runtime.serving.fit import Bases, require_fit, stands_on_top
from lowra.runtime.serving.pages import MOST_BYTES
from lowra.runtime.serving.registered import PoolStatus, Registered
from lowra.runtime.serving.residents import Residents
from lowra.runtime.serving.sources import source_of


class AdapterPool:
    """Adapters of a compiled model, by name.

    `add` registers: the folder's header is read and checked against the model, no tensor. `use`
    brings what a batch names into memory and has the model's layers apply it as it is packed; the
    model's tensors are never touched. `budget_bytes` is allocated at once, in pages of
    `page_bytes`, by default 64 KiB, or more where a dense row of the model would not fit into that;
    8 GiB is the most.

    Raises AdapterError for a model that is not compiled, or whose layers peft has wrapped.
    """

    def __init__(
        self, model: nn.Module, budget_bytes: int, *, page_bytes: int | None = None
    ) -> None:
        info = compiled(model)
        if info is None:
            raise AdapterError("this model was not compiled by lowra: compile it first")
        require_unwrapped(model, info)
        layers = quantized_linears(model)
        if page_bytes is None:
            row = 4 * max(max(layer.n, layer.k) for layer in layers.values())
            page_bytes = max(1 << 16, 1 << (row - 1).bit_length())
        if not 64 <= page_bytes <= budget_bytes <= MOST_BYTES or page_bytes % 4:
            raise AdapterError(
                f"budget_bytes={budget_bytes}, page_bytes={page_bytes}: a page has 64 bytes or "
                f"more, by fours, and the budget holds one or more pages, {MOST_BYTES:,} bytes at "
                "most"
            )
        self.model, self._layers, self._bases = model, layers, Bases(model, info)
        device = next(iter(self._layers.values())).codes.device
        self._residents = Residents(budget_bytes // page_bytes, page_bytes // 4, device)
        self._entries: dict[str, Registered] = {}
        self._lock = threading.RLock()
        self._worker: ThreadPoolExecutor | None = None

    # --- what is registered -------------------------------------------------------------------

    def add(
        self, name: str, source: Any, *, replace: bool = False, pin: bool = False,
        on_top: bool | None = None, check_base: bool = True,
    ) -> None:  # fmt: skip
        """Register an adapter: a folder (packed, or PEFT's LoRA, rsLoRA, DoRA or VeRA), a Hub id,
        an AdapterDelta, or (A, B, scaling) by module name.

        `on_top`: whether it adds to the model's own adapter or takes its place; by default as its
        fingerprint says, and on top where it has none. `replace` swaps an adapter of this name for
        the new one, at once and whole; `pin` keeps it in memory from now on.

        Raises AdapterError, with nothing changed, for an adapter of another base, one that the
        model has no place for, one larger than the pool, and a name that is taken or in use.
        """
        found = source_of(source, check_base)
        facts, seal = found.facts(), found.seal()
        shapes = {key: (layer.n, layer.k) for key, layer in self._layers.items()}
        require_fit(name, facts, shapes, self.model)
        above = stands_on_top(name, facts, self._bases, on_top, check_base)
        budget = self._residents.budget_bytes
        if facts.size_bytes > budget:
            raise AdapterError(
                f"adapter {name!r} takes {facts.size_bytes:,} bytes, the pool has "
                f"{budget:,}: make it larger, or compress the adapter (lowra.compress_adapter)"
            )
        entry = Registered(found, facts.kind, facts.size_bytes, above, seal)
        with self._lock:
            old = self._entries.get(name)
            if old is not None and not replace:
                raise AdapterError(f"an adapter {name!r} is registered already: pass replace=True")
            self._drop(name, "replaced")
            self._entries[name] = entry
        if not pin and name not in self._residents.pinned:
            return
        try:
            self.pin(name)
        except BaseException:
            self._take_back(name, entry, old)
            raise

    def _take_back(self, name: str, entry: Registered, old: Registered | None) -> None:
        """Undo an `add` that failed, unless another one followed or a batch has the new adapter."""
        with self._lock:
            if self._entries.get(name) is not entry or name in self._residents:
                return
            del self._entries[name]
            if old is not None:
                self._entries[name] = old

    def remove(self, name: str) -> None:
        """Forget an adapter. Raises AdapterError while a batch uses it."""
        with self._lock:
            self._entry(name)
            self._drop(name, "removed")
            self._residents.pin(name, False)
            del self._entries[name]

    def pin(self, name: str) -> None:
        """Bring an adapter into memory and keep it there until `unpin`."""
        self._bring(name, hold=True)
        with self._lock:
            self._residents.pin(name, True)
            self._residents.release(name)

    def unpin(self, name: str) -> None:
        """Let an adapter leave memory again when room is needed."""
        with self._lock:
            self._entry(name)
            self._residents.pin(name, False)

    def prefetch(self, *names: str) -> None:
        """Bring adapters into memory in the background; a later `use` waits for what is on its way.

        What fails is tried again, and raises, where it is used.
        """
        for name in names:
            with self._lock:
                entry = self._entry(name)
                if entry.coming is not None or name in self._residents:
                    continue
                if self._worker is None:
                    self._worker = ThreadPoolExecutor(1, thread_name_prefix="lowra-adapters")
                entry.coming = self._worker.submit(self._fetch, name, entry)

    def _fetch(self, name: str, entry: Registered) -> None:
        try:
            self._load(name, entry)
        finally:
            with self._lock:
                entry.coming = None

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def status(self) -> PoolStatus:
        with self._lock:
            held = self._residents
            return PoolStatus(
                len(self._entries), held.names, held.pinned, held.budget_bytes, held.used_bytes,
                held.page_bytes, held.loads, held.evictions,
            )  # fmt: skip

    def size_bytes(self, name: str) -> int:
        """Bytes of the pages that an adapter takes; of its file while it is not resident."""
        with self._lock:
            entry = self._entry(name)
            return self._residents.bytes_of(name) or entry.size_bytes

    # --- serving ------------------------------------------------------------------------------

    @contextmanager
    def use(self, adapters: Choices, *, expand: int = 1) -> Iterator[Batch]:
        """Within the block the model applies these adapters, and no others.

        `adapters`: one choice for all, a list with one per sequence of the batch, or a list of
        lists with one per token. A choice is a name, {name: weight} for a weighted sum, or None.
        `expand`: rows that each sequence becomes, as `generate` does for beams.

        Raises AdapterError for unknown names, for adapters that do not fit into the pool together,
        and within another block of this model, of whichever pool, thread or adapter in training:
        choices do not add up.
        """
        names = {name for name in read_choices(adapters, lambda _: True).names}
        with self._lock:
            entries = {name: self._entry(name) for name in names}
        batch = read_choices(adapters, lambda name: entries[name].on_top, expand)
        if self.model.training:
            raise AdapterError("the model is in training mode; a pool serves: call model.eval()")
        held: list[str] = []
        with claim(self._layers.values()):
            try:
                for name in batch.names:
                    self._bring(name, hold=True, beside=batch.names)
                    held.append(name)
                self._serve(batch)
                yield batch
            finally:
                for layer in self._layers.values():
                    object.__setattr__(layer, "served", None)
                with self._lock:
                    for name in held:
                        self._residents.release(name)

    def generate(self, *inputs: Any, adapters: Choices, **options: Any) -> Any:
        """`model.generate` under `use`, one choice per prompt: beams and returned sequences take
        that of their prompt."""
        model: Any = self.model
        config = options.get("generation_config") or model.generation_config
        counts = ("num_beams", "num_return_sequences")
        expand = max(options.get(key) or getattr(config, key, None) or 1 for key in counts)
        with self.use(adapters, expand=expand):
            return model.generate(*inputs, **options)

    def _serve(self, batch: Batch) -> None:
        """Give every layer what the batch's adapters change at it."""
        if not batch.names:
            return
        device = self._residents.words.device
        for name, layer in self._layers.items():
            *tables, rank, rescales = self._residents.tables(batch.names, name)
            chunks, bounds, scalings = (table.to(device) for table in tables)
            words = self._residents.words
            mix = SiteMix(name, batch, words, chunks, bounds, scalings, rank, rescales)
            object.__setattr__(layer, "served", mix)  # a module's own way takes ten times as long

    # --- memory -------------------------------------------------------------------------------

    def _entry(self, name: str) -> Registered:
        found = self._entries.get(name)
        if found is None:
            raise AdapterError(f"no adapter {name!r} is registered; {nearest(name, self._entries)}")
        return found

    def _drop(self, name: str, verb: str) -> None:
        """Take an adapter out of memory; under the lock."""
        if self._residents.in_use(name):
            raise AdapterError(
                f"adapter {name!r} is in use by a batch and cannot be {verb}: leave its `use` block"
            )
        self._residents.drop(name)

    def _bring(self, name: str, hold: bool, beside: Sequence[str] = ()) -> None:
        """See to it that an adapter is in memory, and hold it there."""
        while True:
            coming = self._entry(name).coming
            if coming is not None:
                with suppress(LowraError):
                    coming.result()
            with self._lock:
                entry = self._entry(name)
                if self._residents.touch(name, hold):
                    return
            self._load(name, entry, beside)

    def _load(self, name: str, entry: Registered, beside: Sequence[str] = ()) -> None:
        """Read an adapter outside of the lock, then put it into pages.

        Does nothing where it was replaced or removed meanwhile.
        """
        if entry.source.seal() != entry.seal:
            raise AdapterError(
                f"adapter {name!r} has changed on disk since it was registered: add it again with "
                "replace=True"
            )
        delta = entry.source.load(self._layers, entry.on_top)
        image = self._residents.laid_out(name, delta)
        with self._lock:
            if self._entries.get(name) is entry:
                self._residents.put(name, delta, image, beside)
