"""Which adapters suit an input: retrieval by embedding, and a weighted mixture of what is found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lowra.compiler.errors import AdapterError

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to vectors [texts, d]."""

INSTRUCTION = "Represent the sentence for similar task retrieval: "
"""What LoraRetriever puts before a text that its encoder (INSTRUCTOR) is given."""


class AdapterIndex:
    """Adapters by what they were trained on (LoraRetriever, arXiv 2402.09997; RAMoLE, 2406.16989).

    An adapter's vector is the mean of the unit vectors of some of its samples; an input is given
    the adapters with the largest inner products. RAMoLE's router, which weighs by what the adapters
    put out, is not built: weights come from the similarities.
    """

    def __init__(self, embed: Embed, instruction: str = INSTRUCTION) -> None:
        self._embed, self._instruction = embed, instruction
        self._vectors: dict[str, Tensor] = {}

    def _unit(self, texts: Sequence[str]) -> Tensor:
        found = self._embed([self._instruction + text for text in texts]).float()
        if found.dim() != 2 or len(found) != len(texts) or not found.isfinite().all():
            raise AdapterError(
                f"embedding {len(texts)} texts gave {list(found.shape)}, or NaN: it must give one "
                "finite vector per text"
            )
        return functional.normalize(found, dim=1)

    def add(self, name: str, samples: Sequence[str]) -> None:
        """Describe an adapter by samples of its task; replaces what was said of it before."""
        if not samples:
            raise AdapterError(f"adapter {name!r} is described by no sample: give one or more")
        self._vectors[name] = functional.normalize(self._unit(samples).mean(dim=0), dim=0)

    def choose(
        self, texts: Sequence[str], top: int = 3, temperature: float = 0.1, uniform: bool = False
    ) -> list[dict[str, float]]:
        """For each text {name: weight} of the `top` most similar adapters: what `AdapterPool.use`
        takes. Weights are softmax(similarity / temperature) over these, or all 1 / top with
        `uniform`, which is LoraRetriever's mixture. Raises AdapterError."""
        if not self._vectors:
            raise AdapterError("the index is empty: add adapters first")
        if top < 1 or not (math.isfinite(temperature) and temperature > 0):
            raise AdapterError(f"top={top}, temperature={temperature}: 1 or more, and above 0")
        names = list(self._vectors)
        similar = self._unit(texts) @ torch.stack([self._vectors[name] for name in names]).T
        best, places = similar.topk(min(top, len(names)), dim=1)
        shares = torch.full_like(best, 1 / best.shape[1])
        if not uniform:
            shares = (best / temperature).softmax(dim=1)
        rows = zip(places.tolist(), shares.tolist(), strict=True)
        return [{names[i]: w for i, w in zip(*row, strict=True)} for row in rows]
