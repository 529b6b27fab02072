"""Perplexity and KL by stored bits, both presets, on WikiText-2, without fine-tuning.

    python -m benchmarks.quality --data FOLDER [--bits 4.25 ... ] [--presets default lowra]

FOLDER holds wikitext2-valid.txt (calibration: 32 windows of 1024 tokens) and wikitext2-test.txt
(32 windows of 1024 tokens). Budgets are stored bits per compressed weight for both presets: the
paper's preset counts code bits, so its code budget is lowered until its stored bits fit. Every
linear but the head is compressed. Writes benchmarks/results/quality.json after every row, and
resumes from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

import lowra
from benchmarks.results_file import FOLDER, write_results
from lowra.compiler.progress import show_progress
from lowra.compiler.storage import row_bits
from lowra.runtime.module_view import adapters_disabled
from lowra.workflows.evaluate import evaluate, windows
from lowra.workflows.models import fetch_smollm2, load_model

COUNT, CONTEXT = 32, 1024
BUDGETS = (4.25, 3.25, 2.25, 2.0, 1.75, 1.5)
COLUMNS = ("preset", "bit_budget", "stored_bits", "code_bits", "perplexity", "kl",
           "perplexity_with_adapter", "seconds")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bits", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--presets", nargs="+", default=["default", "lowra"])
    parser.add_argument("--work-dir", type=Path, default=Path("lowra-demo/quality-work"))
    arguments = parser.parse_args()
    model, tokenizer = load_model(fetch_smollm2())
    texts = [(arguments.data / f"wikitext2-{part}.txt").read_text() for part in ("valid", "test")]
    calibration, test = (windows(t, tokenizer, count=COUNT, context=CONTEXT) for t in texts)
    rows = finished_rows()
    with show_progress():
        if not any(row["preset"] == "original" for row in rows):
            result = evaluate(model, test, batch=1)
            rows.append({"preset": "original", "bit_budget": 16.0, "perplexity": result.perplexity})
            save(rows)
        for preset in arguments.presets:
            for bits in arguments.bits:
                if not any(r["preset"] == preset and r["bit_budget"] == bits for r in rows):
                    rows.append(measure(model, test, calibration, preset, bits, arguments.work_dir))
                    save(rows)
                    Console().print(rows[-1])
    Console().print(table_of(rows))


def finished_rows() -> list[dict[str, Any]]:
    """Rows of an earlier run with this version, to resume from."""
    path = FOLDER / "quality.json"
    if not path.exists():
        return []
    return json.loads(path.read_text())["rows"]


def save(rows: list[dict[str, Any]]) -> None:
    protocol = {
        "model": "SmolLM2-135M-Instruct (bfloat16)", "test": "WikiText-2 test", "windows": COUNT,
        "context": CONTEXT, "calibration": "WikiText-2 valid, 32 x 1024 tokens",
        "compressed": "every linear but the head", "fine_tuning": "none",
    }  # fmt: skip
    write_results("quality", {"protocol": protocol, "rows": rows})


def measure(
    model: nn.Module, test: Any, calibration: Any, preset: str, bits: float, work_dir: Path
) -> dict[str, Any]:
    budget = bits if preset == "default" else paper_code_bits(model, bits)
    if budget is None:
        return {"preset": preset, "bit_budget": bits, "unreachable": True}
    compressed = lowra.compile(
        model, bit_budget=budget, preset=preset, context=CONTEXT,
        calibration=calibration if preset == "default" else None,
        calibration_tokens=COUNT * CONTEXT, work_dir=work_dir,
    )  # fmt: skip
    totals = compressed.lowra.report["totals"]
    with adapters_disabled(compressed):
        base = evaluate(compressed, test, reference=model, batch=1)
    adapted = evaluate(compressed, test, batch=1)
    return {
        "preset": preset, "bit_budget": bits, "stored_bits": totals["stored_bits"],
        "code_bits": totals["code_bits"], "rows": totals["rows"],
        "perplexity": base.perplexity, "kl": base.kl,
        "perplexity_with_adapter": adapted.perplexity,
        "adapter_bits": totals["adapter_bits"],
        "seconds": compressed.lowra.report["seconds"]["total"],
    }  # fmt: skip


def paper_code_bits(model: nn.Module, stored: float) -> float | None:
    """The largest code budget whose stored bits surely fit, or None where none does.

    What the paper stores beside codes (absmax scales, tables, width tags) grows with the widths;
    tables grow convexly with the width, so a mix of the narrowest and the widest bounds them.
    """
    best = None
    for hundredths in range(100, 401):
        budget = hundredths / 100
        if worst_stored_bits(model, budget) <= stored:
            best = budget
    return best


def worst_stored_bits(model: nn.Module, code_bits: float) -> float:
    recipe = lowra.Recipe(bit_budget=code_bits, preset="lowra")
    group, shared = recipe.layout
    widths = recipe.candidate_widths
    sites = lowra_sites(model)
    total = weights = 0.0
    for n, k in sites:
        beside = [row_bits(k, b, group, shared) - b * k for b in widths]
        slope = (beside[-1] - beside[0]) / (widths[-1] - widths[0])
        total += n * (k * code_bits + beside[0] + slope * (code_bits - widths[0]))
        weights += n * k
    return total / weights


def lowra_sites(model: nn.Module) -> list[tuple[int, int]]:
    """(n, k) of every linear but the head."""
    head = model.get_output_embeddings()
    return [
        (m.out_features, m.in_features)
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not head
    ]


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"WikiText-2 test, {COUNT} windows of {CONTEXT} tokens")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        values = [row.get(column) for column in COLUMNS]
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v or "") for v in values))
    return table


if __name__ == "__main__":
    main()
