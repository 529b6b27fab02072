"""Who a model's layers serve: one batch of a pool, or one adapter in training, at a time."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from lowra.compiler.errors import AdapterError
from lowra.runtime.modules import QuantizedLinear

_claimed: weakref.WeakSet[QuantizedLinear] = weakref.WeakSet()
_lock = threading.Lock()


@contextmanager
def claim(layers: Collection[QuantizedLinear]) -> Iterator[None]:
    """Within the block no other has these layers, whichever pool or thread it is.

    Raises AdapterError where one of them is claimed already.
    """
    with _lock:
        if any(layer in _claimed for layer in layers):
            raise AdapterError(
                "the model serves adapters already, in a block of this thread or another: leave "
                "that block first; adapters of one pool that are to add up are one choice of it"
            )
        _claimed.update(layers)
    try:
        yield
    finally:
        with _lock:
            _claimed.difference_update(layers)
