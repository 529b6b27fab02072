"""torch's attention op of CPUs in plain products, for devices that have no such op.

Values, gradients and layouts in memory are those of the op: what is behind it may take a view of
its result that another layout does not allow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs [b, h, l, e] and the logarithm of each query's sum, float32 [b, h, l].

    query [b, h, l, e]; key and value [b, h or fewer, s, e], of which each then serves h / fewer
    neighbouring heads. A query that may look at nothing gives zeros. Computed in float32.
    """
    assert dropout_p == 0.0, "a compile evaluates, without dropout"
    heads = query.shape[-3] // key.shape[-3]
    key, value = (t.repeat_interleave(heads, -3) if heads > 1 else t for t in (key, value))
    scores = _scores(query, key, is_causal, attn_mask, scale)
    sums = scores.logsumexp(-1)
    sums = sums.masked_fill(sums.isneginf(), 0.0)
    out = torch.empty_like(query)
    out.copy_((scores - sums[..., None]).exp() @ value.float())
    return out, sums.transpose(1, 2).contiguous().transpose(1, 2)


def attention_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor,
    dropout_p: float, is_causal: bool,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of query, key and value, which have the same heads, from that of `out`."""
    assert dropout_p == 0.0, "a compile evaluates, without dropout"
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    shares = (_scores(query, key, is_causal, attn_mask, scale) - sums[..., None]).exp()
    wide = grad.float()
    of_shares = wide @ value.float().transpose(-1, -2)
    inner = (wide * out.float()).sum(-1, keepdim=True)
    of_scores = shares * (of_shares - inner) * factor
    found = (
        (query, of_scores @ key.float()), (key, of_scores.transpose(-1, -2) @ query.float()),
        (value, shares.transpose(-1, -2) @ wide),
    )  # fmt: skip
    of_query, of_key, of_value = (torch.empty_like(like).copy_(made) for like, made in found)
    return of_query, of_key, of_value


def _scores(
    query: Tensor, key: Tensor, is_causal: bool, mask: Tensor | None, scale: float | None
) -> Tensor:
    """float32 [b, h, l, s]; -inf where a query may not look."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores if mask is None else scores + mask
