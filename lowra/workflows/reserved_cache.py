"""A key-value cache with room for the tokens to come.

transformers' own cache joins old and new keys at every token: over 256 tokens of 64 windows that
copies the whole cache 255 times, a tenth of the time of writing calibration text (SmolLM2-135M,
AMD EPYC, 2026-11-26).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """A layer of `keys` and `values` [windows, groups, held, d] with room for `tokens` tokens; past
    these it grows as its parent does."""

    def __init__(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._key_room = _room(keys, tokens)
        self._value_room = _room(values, tokens)
        self._take(keys, values, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Put states [windows, groups, new, d] behind the held ones; all of them, as views."""
        held = self.get_seq_length()
        if held + key_states.shape[-2] > self._key_room.shape[-2]:
            return super().update(key_states, value_states, *args, **kwargs)
        self._take(key_states, value_states, held)
        return self.keys, self.values

    def _take(self, keys: Tensor, values: Tensor, start: int) -> None:
        end = start + keys.shape[-2]
        self._key_room[..., start:end, :] = keys
        self._value_room[..., start:end, :] = values
        self.keys = self._key_room[..., :end, :]
        self.values = self._value_room[..., :end, :]


def reserve(cache: Any, tokens: int) -> None:
    """Give the plain growing layers of a model's `cache`, once it holds something, room for
    `tokens` tokens. Layers of other kinds (sliding, recurrent, static) stay."""
    layers = getattr(cache, "layers", None) or []
    for index, layer in enumerate(layers):
        if type(layer) is not DynamicLayer or not 0 < layer.get_seq_length() < tokens:
            continue
        if layer.keys is not None and layer.values is not None:
            layers[index] = ReservedLayer(layer.keys, layer.values, tokens)


def _room(states: Tensor, tokens: int) -> Tensor:
    return states.new_empty((*states.shape[:-2], tokens, states.shape[-1]))
