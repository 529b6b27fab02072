"""Attention of one new token per window, and the model that uses it for a while."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from lowra.workflows import decode_attention as decoding
from lowra.workflows.decode_attention import decode_attention, decode_attention_forward


@given(
    windows=st.integers(1, 5), groups=st.integers(1, 3), shares=st.integers(1, 4),
    tokens=st.integers(1, 40), width=st.sampled_from([1, 4, 16, 64]), seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_it_is_attention(windows, groups, shares, tokens, width, seed, dtype):
    torch.manual_seed(seed)
    query = torch.randn(windows, groups * shares, 1, width).to(dtype)
    key, value = (torch.randn(windows, groups, tokens, width).to(dtype) for _ in range(2))
    found, _ = decode_attention_forward(torch.nn.Module(), query, key, value, None, 0.3)
    scores = 0.3 * query.double() @ key.double().repeat_interleave(shares, 1).mT
    wanted = scores.softmax(-1) @ value.double().repeat_interleave(shares, 1)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(found.double(), wanted.transpose(1, 2), **close)


def tiny_llama(attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def decoded(model, ids):
    """The logits of each token in turn, and of the last as part of a padded batch."""
    cache, found = None, []
    for token in ids.split(1, dim=1):
        output = model(input_ids=token, cache=cache, use_cache=True)
        cache = output.cache
        found.append(output.logits)
    padded = model(input_ids=ids, attention_mask=(ids > 3).long()).logits
    return torch.cat(found, 1), padded


@torch.no_grad()
def test_a_model_decodes_the_same_with_it_and_has_its_own_back(monkeypatch):
    model = tiny_llama()
    ids = torch.randint(101, (3, 7), generator=torch.Generator().manual_seed(0))
    before = decoded(model, ids)
    calls = []
    real = decode_attention_forward

    def counted(module, query, *rest, **kwargs):
        calls.append(query.shape[2])
        return real(module, query, *rest, **kwargs)

    monkeypatch.setattr(decoding, "decode_attention_forward", counted)
    with decode_attention(model):
        torch.testing.assert_close(decoded(model, ids), before, rtol=1e-4, atol=1e-5)
    assert calls == [1] * 14 + [7] * 2
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(decoded(model, ids), before, rtol=0, atol=0)
    assert len(calls) == 16


@pytest.mark.parametrize("attention", ["eager"])
def test_other_attention_is_left_alone(attention):
    model = tiny_llama(attention)
    with decode_attention(model):
        assert model.config._attn_implementation == attention


def test_a_model_that_fails_has_its_own_back():
    model = tiny_llama()
    with pytest.raises(ValueError, match="stop"), decode_attention(model):
        raise ValueError("stop")
    assert model.config._attn_implementation == "sdpa"
