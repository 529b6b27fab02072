"""Whatever is done to a pool, in whatever order: the right adapters, or a refusal, and no leak."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from lowra.compiler.errors import AdapterError
from lowra.runtime.module_view import quantized_linears
from tests.runtime.served_models import CLOSE, folder, llama, pool_of

KINDS = ("lora", "rslora", "dora", "vera", "packed-lora", "packed-wide")
PAGES, PAGE_BYTES = 12, 1024

Choice = str | dict[str, float] | None
names = st.sampled_from(["a", "b", "c", "d", "e"])
choices = st.one_of(
    st.none(), names, names, st.dictionaries(names, st.sampled_from([1.0, 0.5, -2.0]), max_size=3)
)


def inputs() -> dict[str, Tensor]:
    """One token for every linear."""
    generator = torch.Generator().manual_seed(0)
    layers = quantized_linears(llama().compiled).items()
    return {name: torch.randn(layer.k, generator=generator) for name, layer in layers}


def outputs(rows: int, tokens: int) -> dict[str, Tensor]:
    """What every linear makes of it now, [rows * tokens, n]."""
    layers, found = quantized_linears(llama().compiled), {}
    for name, x in inputs().items():
        with torch.no_grad():
            found[name] = layers[name](x.expand(rows, tokens, -1)).flatten(0, 1)
    return found


@functools.cache
def truths() -> dict[str | None, dict[str, Tensor]]:
    """The same with none and with each adapter alone; test_pool.py proves that against PEFT."""
    pool, found = pool_of(llama().compiled, *KINDS), {}
    for kind in (None, *KINDS):
        with pool.use(kind):
            found[kind] = {name: y[0] for name, y in outputs(1, 1).items()}
    return found


@functools.cache
def pages_of(kind: str) -> tuple[int, int]:
    """Pages of an adapter, and of the basis that it shares with others of its kind."""
    pool = pool_of(llama().compiled, kind, page_bytes=PAGE_BYTES)
    with pool.use(kind):
        own, used = pool.size_bytes(kind), pool.status().used_bytes
    return own // PAGE_BYTES, (used - own) // PAGE_BYTES


def pages(kinds: Iterable[str]) -> int:
    found = list(kinds)
    return sum(pages_of(k)[0] for k in found) + sum(pages_of(k)[1] for k in set(found))


class Pool(RuleBasedStateMachine):
    """`holds`: what is registered, by kind; the rest is asked of the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(llama().compiled, pages=PAGES, page_bytes=PAGE_BYTES)
        self.holds: dict[str, str] = {}
        self.truths = truths()

    def fits(self, wanted: Iterable[str], holds: Mapping[str, str]) -> bool | None:
        """Whether adapters find room beside the pinned; None where that depends on whether a
        pinned one, left out of memory by a failed replacement, has come back meanwhile."""
        status, need = self.pool.status(), set(wanted)
        stay = need | set(status.pinned)
        if pages(holds[name] for name in stay) <= PAGES:
            return True
        least = need | (set(status.pinned) & set(status.resident))
        return False if pages(holds[name] for name in least) > PAGES else None

    @rule(name=names, kind=st.sampled_from(KINDS), pin=st.integers(0, 3).map(lambda i: i == 0))
    def add(self, name: str, kind: str, pin: bool) -> None:
        if name in self.holds:
            with pytest.raises(AdapterError, match="registered already"):
                self.pool.add(name, folder(kind), pin=pin)
        held = pin or name in self.pool.status().pinned
        fits = not held or self.fits({name}, {**self.holds, name: kind})
        try:
            self.pool.add(name, folder(kind), replace=name in self.holds, pin=pin)
            assert fits is not False
            self.holds[name] = kind
        except AdapterError as error:
            assert "no room" in str(error) and not fits

    @rule(name=names)
    def remove(self, name: str) -> None:
        if name not in self.holds:
            with pytest.raises(AdapterError, match="no adapter"):
                self.pool.remove(name)
            return
        self.pool.remove(name)
        del self.holds[name]

    @precondition(lambda self: self.holds)
    @rule(name=names)
    def pin(self, name: str) -> None:
        if name not in self.holds:
            return
        fits = self.fits({name}, self.holds)
        try:
            self.pool.pin(name)
            assert fits is not False and name in self.pool.status().pinned
        except AdapterError as error:
            assert "no room" in str(error) and not fits

    @precondition(lambda self: self.pool.status().pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pool.unpin(data.draw(st.sampled_from(self.pool.status().pinned)))

    @precondition(lambda self: self.holds)
    @rule(wanted=st.lists(names, max_size=3))
    def prefetch(self, wanted: list[str]) -> None:
        self.pool.prefetch(*[name for name in wanted if name in self.holds])

    @precondition(lambda self: len(self.holds) > 1)
    @rule(
        mix=st.lists(choices, min_size=1, max_size=4), by=st.sampled_from(["row", "token", "all"])
    )
    def use(self, mix: list[Choice], by: str) -> None:
        rows = [self.known(choice) for choice in mix]
        rows = rows[:1] * len(rows) if by == "all" else rows
        used = {name for row in rows for name in row}
        shape = (1, len(rows)) if by == "token" else (len(rows), 1)
        given: Any = {"row": rows, "token": [rows], "all": rows[0]}[by]
        fits = self.fits(used, self.holds)
        try:
            with self.pool.use(given):
                assert fits is not False
                self.serves(rows, shape)
                self.refuses(used)
                self.pool.prefetch(*self.holds)  # others may come and go, not these
                self.serves(rows, shape)
        except AdapterError as error:
            assert "no room" in str(error) and not fits

    def known(self, choice: Choice) -> dict[str, float]:
        mix = {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice
        return {name: weight for name, weight in mix.items() if name in self.holds}

    def serves(self, rows: list[dict[str, float]], shape: tuple[int, int]) -> None:
        got, true = outputs(*shape), self.truths
        for i, row in enumerate(rows):
            for site, none in true[None].items():
                changes = [w * (true[self.holds[n]][site] - none) for n, w in row.items()]
                torch.testing.assert_close(got[site][i], sum(changes, none), **CLOSE)

    def refuses(self, used: set[str]) -> None:
        with pytest.raises(AdapterError, match="serves adapters already"):
            self.pool.use(None).__enter__()
        for name in used:
            with pytest.raises(AdapterError, match="in use by a batch and cannot be removed"):
                self.pool.remove(name)
            with pytest.raises(AdapterError, match="in use by a batch and cannot be replaced"):
                self.pool.add(name, folder("lora"), replace=True)

    @invariant()
    def every_page_is_free_or_has_one_owner(self) -> None:
        with self.pool._lock:
            held = self.pool._residents
            owners = [*held._held.values(), *held._bases.values()]
            taken = [id for owner in owners for id in owner.ids]
            assert sorted([*taken, *held._memory._free]) == list(range(PAGES))
            assert not any(one.uses for one in held._held.values())
            needed = [id for one in held._held.values() for id in one.bases]
            assert {id: b.needed for id, b in held._bases.items()} == {
                id: needed.count(id) for id in needed
            }
            assert set(held.names) <= set(self.holds) == set(self.pool.names)

    def teardown(self) -> None:
        for name in self.pool.status().pinned:
            self.pool.unpin(name)
        for name in self.holds:
            with self.pool.use(name):  # waits for what is on its way
                pass
        for name in self.holds:
            self.pool.remove(name)
        assert self.pool.status().used_bytes == 0
        super().teardown()


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=12, stateful_step_count=30, deadline=None, derandomize=True,
    phases=[Phase.generate],  # a failure is 30 steps long, and shorter only after minutes
)  # fmt: skip
