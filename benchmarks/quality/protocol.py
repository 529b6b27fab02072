"""What every method is measured with: model, text, windows, and one way of scoring.

A method hands over dense weights; all of them are scored by `lowra.workflows.evaluate` on the same
windows, against the same logits of the original.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowra.workflows.evaluate import Evaluation, evaluate, windows
from lowra.workflows.models import fetch_smollm2, load_model

COUNT, CONTEXT = 32, 1024
PROTOCOL: dict[str, Any] = {
    "model": "SmolLM2-135M-Instruct (bfloat16)", "test": "WikiText-2 test", "windows": COUNT,
    "context": CONTEXT, "calibration": f"WikiText-2 valid, {COUNT} x {CONTEXT} tokens",
    "compressed": "every linear but the head", "fine_tuning": "none",
}  # fmt: skip


class RememberedLogits(nn.Module):
    """Logits of `model`, computed once per window: [batch, context, vocab] in the model's dtype.

    Every row of the benchmark compares with the same 32 windows; remembering them (3.2 GB for
    49152 entries in bfloat16) takes nearly half of the work from each row but the first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a child, so that its training flags stay its own
        self._known: dict[bytes, Tensor] = {}

    def forward(self, ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._model[0](ids, use_cache=False).logits
        return self._known[key]


@dataclass(frozen=True)
class Task:
    """One model under the protocol.

    `calibration` and `test` are int64 [windows, context]; `source` is the file that the model came
    from, for a peer that wants one; `work_dir` takes what a method leaves on disk.
    """

    model: nn.Module
    tokenizer: Any
    source: Path
    calibration: Tensor
    test: Tensor
    work_dir: Path
    reference: RememberedLogits = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reference", RememberedLogits(self.model))

    @cached_property
    def sites(self) -> dict[str, nn.Linear]:
        """Every linear but the head, by qualified name: what each method compresses."""
        return sites_of(self.model)

    @property
    def weight_count(self) -> int:
        return sum(site.weight.numel() for site in self.sites.values())

    def score_original(self) -> Evaluation:
        return evaluate(self.model, self.test, batch=1)

    def score(self, model: nn.Module) -> Evaluation:
        """Perplexity of `model`, and its divergence from the original, on the test windows."""
        return evaluate(model, self.test, reference=self.reference, batch=1)

    def score_weights(self, weights: Mapping[str, Tensor]) -> Evaluation:
        """Score the original with `weights`, by site [n, k], in place of its own."""
        return self.score(with_weights(self.model, weights))


def sites_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of `model` but the head, by qualified name."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `model` with each site's weight replaced, in the model's dtype.

    Raises `ValueError` unless `weights` has exactly the sites of the model, finite, in its shapes.
    """
    changed = copy.deepcopy(model)
    sites = sites_of(changed)
    if sites.keys() != weights.keys():
        odd = sorted(sites.keys() ^ weights.keys())
        raise ValueError(f"a method must give every compressed weight and no other: {odd[:3]}")
    for name, site in sites.items():
        weight = weights[name]
        if weight.shape != site.weight.shape:
            raise ValueError(f"{name} is {list(site.weight.shape)}, got {list(weight.shape)}")
        if not weight.isfinite().all():
            raise ValueError(f"the dequantised weight of {name} holds a value that is not finite")
        with torch.no_grad():
            site.weight.copy_(weight)
    return changed


def smollm2_task(data: Path, work_dir: Path) -> Task:
    """The committed results' task. `data` holds wikitext2-valid.txt and wikitext2-test.txt."""
    source = fetch_smollm2()
    model, tokenizer = load_model(source)
    texts = [(data / f"wikitext2-{part}.txt").read_text() for part in ("valid", "test")]
    calibration, test = (windows(t, tokenizer, count=COUNT, context=CONTEXT) for t in texts)
    work_dir.mkdir(parents=True, exist_ok=True)
    return Task(model, tokenizer, source, calibration, test, work_dir)
