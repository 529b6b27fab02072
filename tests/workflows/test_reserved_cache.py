"""A cache with room gives what transformers' own gives, without copying what it holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from lowra.workflows.reserved_cache import ReservedLayer, reserve


def filled(states):
    cache = DynamicCache()
    cache.update(*states, 0)
    return cache


@given(
    room=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_it_holds_what_the_own_cache_holds_in_the_room_and_past_it(room, sizes, seed):
    torch.manual_seed(seed)
    states = [(torch.randn(2, 3, size, 4), torch.randn(2, 3, size, 5)) for size in sizes]
    own, reserved = filled(states[0]), filled(states[0])
    reserve(reserved, room)
    for keys, values in states[1:]:
        wanted, found = own.update(keys, values, 0), reserved.update(keys, values, 0)
        assert all(map(torch.equal, found, wanted))
        assert reserved.get_seq_length() == own.get_seq_length()


def test_held_tokens_stay_where_they_are():
    cache = filled((torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4)))
    reserve(cache, 8)
    places = {tensor.data_ptr() for tensor in (cache.layers[0].keys, cache.layers[0].values)}
    for _ in range(7):
        found = cache.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4), 0)
        assert {tensor.data_ptr() for tensor in found} == places
    assert found[0].shape == (2, 3, 8, 4)


@pytest.mark.parametrize("cache", [None, object(), DynamicCache()])
def test_what_has_no_growing_layers_stays(cache):
    reserve(cache, 8)
    assert not getattr(cache, "layers", None)


def test_layers_of_other_kinds_and_empty_ones_stay():
    cache = filled((torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2)))
    sliding = DynamicSlidingWindowLayer(4)
    sliding.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    empty = type(cache.layers[0])()
    cache.layers += [sliding, empty]
    reserve(cache, 8)
    assert isinstance(cache.layers[0], ReservedLayer)
    assert cache.layers[1:] == [sliding, empty]
