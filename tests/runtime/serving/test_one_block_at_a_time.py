"""A model's layers serve one batch, or one adapter in training: an inner block is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from lowra.compiler.errors import AdapterError
from lowra.runtime.trained_adapter import TrainedAdapter, new_adapter
from tests.runtime.served_models import CLOSE, ids_of, llama, pool_of, run


def trained() -> TrainedAdapter:
    """An adapter that changes something."""
    adapter = new_adapter(llama().compiled, "multi-lora", ("*q_proj",), rank=2, count=2)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "scales" in name:
                parameter.fill_(1.0)
    return adapter


BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a batch": lambda: pool_of(llama().compiled, "lora").use("lora"),
    "a batch of none": lambda: pool_of(llama().compiled).use(None),
    "an adapter in training": lambda: trained().on(llama().compiled),
}


@pytest.mark.parametrize("inner", BLOCKS)
@pytest.mark.parametrize("outer", BLOCKS)
def test_a_block_within_another_is_refused_and_changes_nothing(outer: str, inner: str) -> None:
    """Of other pools, too: the layers are the model's."""
    model, ids = llama().compiled, ids_of(1)
    bare = run(model, ids)
    with BLOCKS[outer]():
        want = run(model, ids)
        with pytest.raises(AdapterError, match="serves adapters already"):
            BLOCKS[inner]().__enter__()
        assert torch.equal(run(model, ids), want)
    assert torch.equal(run(model, ids), bare)
    assert torch.allclose(want, bare, **CLOSE) == (outer == "a batch of none")
    with BLOCKS[inner]():  # free again
        run(model, ids)


def test_of_many_threads_one_serves_and_the_others_are_told() -> None:
    model, ids = llama().compiled, ids_of(1)
    kinds = ("lora", "packed-lora", "packed-wide")
    pools = {kind: pool_of(model, kind) for kind in kinds}
    want: dict[str, torch.Tensor] = {}
    for kind, pool in pools.items():
        with pool.use(kind):
            want[kind] = run(model, ids)
    start, served, told = threading.Barrier(len(kinds)), list[bool](), list[str]()

    def serve(kind: str) -> None:
        start.wait()
        for _ in range(20):
            try:
                with pools[kind].use(kind):
                    served.append(torch.equal(run(model, ids), want[kind]))
            except AdapterError as error:
                told.append(str(error))

    threads = [threading.Thread(target=serve, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served and all(served) and len(served) + len(told) == 20 * len(kinds)
    assert all("serves adapters already" in reason for reason in told)
