"""What merging an adapter costs: measured on text, before anything is written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import cast

from torch import Tensor, nn

from lowra.runtime.module_view import quantized_linears, shallow_copy
from lowra.workflows.evaluate import evaluate


@dataclass(frozen=True)
class MergeCost:
    """The outcome of `merge_cost`, on `tokens` scored positions.

    `kl` is the mean KL(base with adapter || merged) in nats per token: what merging loses.
    `adapter_kl` is KL(base with adapter || base alone): what the adapter does. Where the first is
    no smaller, the merged model is further from the adapted one than the base without an adapter.
    """

    kl: float
    adapter_kl: float
    perplexity: float
    merged_perplexity: float
    tokens: int

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name, for JSON."""
        return asdict(self)


def merge_cost(model: nn.Module, merged: nn.Module, tokens: Tensor) -> MergeCost:
    """Compare a compiled model and its adapter with `merged`, on `tokens` int64 [windows, context].

    Raises what `evaluate` raises.
    """
    base = shallow_copy(model)
    for layer in quantized_linears(base).values():
        layer.adapter_enabled = False
    alone = evaluate(base, tokens, reference=model)
    after = evaluate(merged, tokens, reference=model)
    adapted = evaluate(model, tokens)
    return MergeCost(
        kl=cast("float", after.kl),
        adapter_kl=cast("float", alone.kl),
        perplexity=adapted.perplexity,
        merged_perplexity=after.perplexity,
        tokens=after.tokens,
    )
