"""What the documents tell of fine-tuning, from finetune_quality.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def finetuned(data: Mapping[str, Any]) -> Iterator[str]:
    """Perplexity before and after the same training, and beside the original's."""
    protocol, rows = data["protocol"], list(data["rows"].values())
    yield (
        f"{protocol['model']}; {protocol['train']}; {protocol['test']}; {protocol['batch']} a "
        f"step; adapter: {protocol['adapter']}; {protocol['schedule']}. Bases named `all` "
        "train norms, codebooks and scales too (`benchmarks/results/finetune_quality.json`)."
    )
    yield ""
    yield "| base | stored bits | optimiser | steps | before | after | times the original's |"
    yield "|---|---|---|---|---|---|---|"
    best = {
        (row["optimizer"], row["steps"], row["seed"]): row["perplexity"]
        for row in rows if row["base"] == "original"
    }  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["steps"], -r["stored_bits"], r["base"], r["seed"])):
        whole = best.get((row["optimizer"], row["steps"], row["seed"]))
        ratio = "" if whole is None else f"{row['perplexity'] / whole:.2f}"
        ours = row["base"].startswith("default")
        name = f"**lowra: {row['base']}**" if ours else row["base"]
        yield (
            f"| {name} | {row['stored_bits']:.2f} | {row['optimizer']} | {row['steps']} | "
            f"{row['perplexity_before']:,.2f} | {row['perplexity']:,.2f} | {ratio} |"
        )
