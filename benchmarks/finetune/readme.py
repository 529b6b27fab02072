"""What the documents tell of fine-tuning, from finetune_quality.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def finetuned(data: Mapping[str, Any]) -> Iterator[str]:
    """Perplexity before and after the same training, and beside the original's."""
    protocol = data["protocol"]
    rows = [r for r in data["rows"].values() if r.get("task", "wikitext") == "wikitext"]
    others = [r for r in data["rows"].values() if r.get("task") == "gsm8k"]
    yield (
        f"{protocol['model']}; {protocol['train']}; {protocol['test']}; {protocol['batch']} a "
        f"step; adapter: {protocol['adapter']}; {protocol['schedule']}. Bases named `tuned` "
        'are compiled with `tune="full"`, those named `plain` with `trellis=False`; those named '
        "`all` train norms, codebooks and scales too (`benchmarks/results/finetune_quality.json`)."
    )
    yield ""
    yield from _table(rows)
    if others:
        yield ""
        yield f"The same with {protocol['gsm8k']}:"
        yield ""
        yield from _table(others)
    yield ""
    yield "![Perplexity after training by stored bits](../benchmarks/results/finetune_quality.png)"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
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


LAYERS, ENDS = 32, 2 * 32000 * 4096 * 2
"""Of Llama-2-7B: layers, of which two were measured, and bytes of embedding and head."""


def memory(data: Mapping[str, Any]) -> Iterator[str]:
    """Peak memory of a training step and its parts; a 7B model's weights from two layers of it."""
    where = data["environment"]
    yield (
        f"Measured on a CPU, the second step of {data['tokens']} tokens, rank {data['rank']}, no "
        f"checkpointing, MB are 10^6 bytes ({where['date']}, "
        "`benchmarks/results/finetune_memory.json`):"
    )
    yield ""
    yield (
        "| model | base | peak | weights | adapters | gradients | AdamW | activations and the rest "
        "| weights of all layers | seconds |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in data["rows"]:
        two = row["shapes"] == "llama-7b"
        name = "Llama-2-7B, 2 layers" if two else "SmolLM2-135M"
        parts = (row[p] for p in ("peak", "weights", "adapters", "gradients", "optimizer", "rest"))
        whole = ENDS + (row["weights"] - ENDS) * LAYERS // 2 if two else row["weights"]
        cells = " | ".join(f"{part / 1e6:,.0f}" for part in (*parts, whole))
        yield f"| {name} | {row['base']} | {cells} | {row['seconds']:.1f} |"
