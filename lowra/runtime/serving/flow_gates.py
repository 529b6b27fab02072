"""LoRA-Flow: how much each adapter counts, token by token and layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowra.compiler.errors import AdapterError
from lowra.runtime.module_view import quantized_linears
from lowra.runtime.serving.batch import Batch
from lowra.runtime.serving.pool import AdapterPool

_LAYER = re.compile(r"(?P<layer>.*?\.\d+)\..*")


class FlowGates(nn.Module):
    """Gates of LoRA-Flow (arXiv 2402.11455): in layer l, with input x_t of token t,

        w_t = softmax(W_l x_t / T) + b_l          h' = h + sum over j of w_tj (change by adapter j)

    for all linears of the layer. b is added after the softmax, as in the authors' code. W [J, d]
    and b [J] start at 0, so that all adapters count alike; the adapters are fixed, the gates train
    (the paper needs 200 examples).
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str], temperature: float = 1.0) -> None:
        super().__init__()
        if len(adapters) < 2 or len(set(adapters)) != len(adapters) or temperature <= 0:
            raise AdapterError(
                f"gates between {list(adapters)} at temperature {temperature}: name two or more "
                "adapters, each once, and a temperature above 0"
            )
        matches = [_LAYER.fullmatch(name) for name in quantized_linears(model)]
        self.layers = tuple(dict.fromkeys(m["layer"] for m in matches if m))
        if not self.layers:
            raise AdapterError("this model has no numbered layers to gate")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise AdapterError(
                "this model is an encoder-decoder: its cross-attention reads the encoder's tokens, "
                "which no gate of the decoder's layers weighs; gate a decoder, or an encoder"
            )
        width = _width(model)
        self.adapters, self.temperature = tuple(adapters), temperature
        count, layers = len(adapters), len(self.layers)
        self.weight = nn.Parameter(torch.zeros(layers, count, width))
        self.bias = nn.Parameter(torch.zeros(layers, count))

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """float32 [..., J]: the weights in a layer for its inputs [..., d]."""
        scores = x.to(self.weight.dtype) @ self.weight[layer].T
        return (scores / self.temperature).softmax(-1) + self.bias[layer]

    @contextmanager
    def use(self, pool: AdapterPool) -> Iterator[Batch]:
        """Within the block the pool's model applies the adapters as the gates say, with gradients
        to the gates. Raises AdapterError as `pool.use` does, and in a forward for a linear that
        reads other rows than its layer is given."""
        found: dict[str, Tensor] = {}

        def gate_of(site: str) -> Tensor | None:
            match = _LAYER.fullmatch(site)
            return None if match is None else found.get(match["layer"])

        def before(place: int, layer: str) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                found[layer] = self(place, inputs[0] if inputs else named["hidden_states"])

            return hook

        with pool.use(dict.fromkeys(self.adapters, 1.0)) as batch:
            batch.gate = gate_of
            handles = [
                pool.model.get_submodule(layer).register_forward_pre_hook(
                    before(place, layer), with_kwargs=True
                )
                for place, layer in enumerate(self.layers)
            ]
            try:
                yield batch
            finally:
                for handle in handles:
                    handle.remove()


def _width(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise AdapterError("this model's config does not tell its hidden_size, which gates read")
    return int(width)
