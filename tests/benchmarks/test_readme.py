"""Tables of adapters and of fine-tuning, from a few made-up results."""

from __future__ import annotations

from typing import Any

from benchmarks.adapters.readme import gain
from benchmarks.finetune.readme import finetuned, memory


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


def test_weights_of_two_layers_stand_for_all() -> None:
    ends = 2 * 32000 * 4096 * 2
    row = dict.fromkeys(("peak", "adapters", "gradients", "optimizer", "rest"), 5_000_000)
    row |= {"shapes": "llama-7b", "base": "lowra 2", "weights": ends + 100_000_000, "seconds": 6.03}
    data = {"environment": {"date": "2026-11-25"}, "tokens": 512, "rank": 16, "rows": [row]}
    told = list(memory(data))[-1]
    whole = (ends + 16 * 100_000_000) / 1e6
    assert told.startswith("| Llama-2-7B, 2 layers | lowra 2 | 5 | 624 |")
    assert told.endswith(f"| {whole:,.0f} | 6.0 |")


def test_rows_of_gsm8k_have_a_table_of_their_own() -> None:
    row = {
        "base": "default 2", "optimizer": "adamw", "steps": 60, "seed": 0, "stored_bits": 2.0,
        "perplexity_before": 9.0, "perplexity": 6.0,
    }  # fmt: skip
    whole = {**row, "base": "original", "stored_bits": 16.0, "perplexity": 3.0}
    answers = [{**r, "task": "gsm8k", "perplexity": r["perplexity"] / 2} for r in (row, whole)]
    names = ("model", "train", "test", "batch", "adapter", "schedule", "gsm8k")
    data = {
        "protocol": dict.fromkeys(names, "a text"),
        "rows": dict(enumerate([row, whole, *answers])),
    }
    lines = list(finetuned(data))
    first, second = (i for i, line in enumerate(lines) if line.startswith("| base"))
    assert [line for line in lines[first:second] if "default 2" in line][0].endswith(
        "6.00 | 2.00 |"
    )
    assert [line for line in lines[second:] if "default 2" in line][0].endswith("3.00 | 2.00 |")
