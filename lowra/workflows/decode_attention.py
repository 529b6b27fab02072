"""Attention of one new token per window, as two batched products.

On CPUs, torch's attention kernel takes a query at a time through the whole cache: with 64 windows
of 256 tokens, 9 heads on 3 of keys, 15.8 ms a layer and thread where two products take 0.9 (AMD
EPYC, bfloat16, 2026-11-25), several times what the linears of the layer take.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lowra_decode"
REPLACED = "sdpa"
STRIDE = 32
"""Tokens by which the longer product grows."""


@contextmanager
def decode_attention(model: Any) -> Generator[None, None, None]:
    """Let `model`, if on a CPU and on torch's attention, decode by `decode_attention_forward`; its
    config is as before afterwards."""
    config = getattr(model, "config", None)
    replaces = getattr(config, "_attn_implementation", None) == REPLACED
    if not replaces or not hasattr(model, "set_attn_implementation") or model.device.type != "cpu":
        yield
        return
    AttentionInterface.register(NAME, decode_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(REPLACED)


def decode_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query [windows, heads, 1, d] over key and value [windows, groups, tokens, d]:
    [windows, 1, heads, d]. Whatever else is asked (more tokens, a mask, a bias) is torch's."""
    asked = attention_mask, kwargs.get("position_bias"), kwargs.get("softcap")
    if query.shape[2] != 1 or dropout or any(x is not None for x in asked):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    windows, heads, _, width = query.shape
    groups = key.shape[1]
    shared = query.reshape(windows, groups, heads // groups, width)
    parts = _parts(key.shape[2])
    scores = torch.cat([shared @ key[:, :, part].mT for part in parts], -1).float()
    shares = (scores * (width**-0.5 if scaling is None else scaling)).softmax(-1).to(value.dtype)
    output = reduce(torch.add, [shares[..., part] @ value[:, :, part] for part in parts])
    return output.reshape(windows, 1, heads, value.shape[-1]), None


def _parts(tokens: int) -> list[slice]:
    """Whole strides of tokens, and the rest: torch's library keeps code for every length that it
    has multiplied, 300 MB of it after 256 tokens."""
    whole = tokens - tokens % STRIDE
    return [part for part in (slice(0, whole), slice(whole, tokens)) if part.stop > part.start]
