"""Tables of adapters and of fine-tuning, from a few made-up results."""

from __future__ import annotations

from typing import Any

from benchmarks.adapters.readme import gain
from benchmarks.finetune.readme import finetuned


def test_shares_stand_by_method_and_adapter_with_their_mean() -> None:
    row = {"bits": 2.0, "loss": 1.0, "share": 0.9}
    data: dict[str, Any] = {
        "environment": {"date": "2026-11-26"},
        "protocol": {"model": "A model", "rank": 16, "optimizer": "AdamW"},
        "rows": {
            "nf4 / wikitext / 80 steps / seed 0": {"without": {"loss": 2.0}, "lowra 2": row},
            "nf4 / python / 80 steps / seed 0": {"lowra 2": {**row, "share": 1.0}, "BIN": row},
        },
    }
    text = "\n".join(gain(data))
    assert "| method | stored bits | nf4, wikitext | nf4, python | mean |" in text
    assert "| **lowra 2** | 2.000 | 90.0% | 100.0% | 95.0% |" in text
    assert "| BIN | 2.000 |  | 90.0% | 90.0% |" in text
    assert "without" not in text


def test_perplexities_stand_beside_the_originals_of_the_same_run() -> None:
    shared = {"optimizer": "adamw", "seed": 0}
    rows = [
        {**shared, "base": "original", "steps": 60, "stored_bits": 16.0, "perplexity_before": 23.6,
         "perplexity": 16.0},
        {**shared, "base": "default 2 all", "steps": 60, "stored_bits": 2.0,
         "perplexity_before": 37.0, "perplexity": 24.0},
        {**shared, "base": "nf4", "steps": 99, "stored_bits": 4.5, "perplexity_before": 28.4,
         "perplexity": 17.6},
    ]  # fmt: skip
    protocol = dict.fromkeys(("model", "train", "test", "batch", "adapter", "schedule"), "")
    text = "\n".join(finetuned({"protocol": protocol, "rows": dict(enumerate(rows))}))
    assert "| **lowra: default 2 all** | 2.00 | adamw | 60 | 37.00 | 24.00 | 1.50 |" in text
    assert "| nf4 | 4.50 | adamw | 99 | 28.40 | 17.60 |  |" in text
