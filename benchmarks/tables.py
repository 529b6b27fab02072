"""Put the committed results into README.md and docs/, between their markers.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.adapters.readme import gain
from benchmarks.finetune.readme import finetuned, memory
from benchmarks.quality.ours import PRESETS, TUNED
from benchmarks.quality.rows import ORIGINAL, missing_by_reason
from benchmarks.results_file import FOLDER
from benchmarks.speed.readme import assigning, fitting, gpu, serving, speed

ROOT = Path(__file__).parent.parent


def main() -> None:
    documents = {
        "README.md": {
            "quality": quality, "demo": demo, "compile": compile_time, "fit": fitting,
            "assign": assigning, "speed_cpu": speed, "adapters": serving, "speed_gpu": gpu,
        },
        "docs/guide-adapters.md": {"adapters_gain": gain},
        "docs/guide-finetuning.md": {"finetune_quality": finetuned, "finetune_memory": memory},
    }  # fmt: skip
    for document, renders in documents.items():
        text = (ROOT / document).read_text()
        for name, render in renders.items():
            path = FOLDER / f"{name}.json"
            if path.exists():
                block = "\n".join(render(json.loads(path.read_text())))
                start, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
                text = re.sub(f"{start}.*?{end}", f"{start}\n{block}\n{end}", text, flags=re.DOTALL)
        (ROOT / document).write_text(text)


def quality(data: dict[str, Any]) -> Iterator[str]:
    """lowra and its peers, sorted by stored bits; what is out of reach or missing is named."""
    protocol, rows = data["protocol"], data["rows"]
    original = next(row for row in rows if row["method"] == ORIGINAL)
    dates = sorted({row["date"] for row in rows if "date" in row})
    when = " to ".join(sorted({*dates[:1], *dates[-1:]}))
    yield (
        f"{protocol['model']}, {protocol['test']}, {protocol['windows']} windows of "
        f"{protocol['context']} tokens, {protocol['compressed']}, no fine-tuning, adapters off; "
        f"calibrated on {protocol['calibration']}. Every method is charged for all that it stores. "
        f"The original: {original['perplexity']:.2f}. ({when}, "
        f"`benchmarks/results/quality.json`, with versions and settings.)"
    )
    yield ""
    yield "| method | stored bits | perplexity | KL | adapter bits | with adapter |"
    yield "|---|---|---|---|---|---|"
    measured = [row for row in rows if row["method"] != ORIGINAL and "stored_bits" in row]
    for row in sorted(measured, key=lambda row: (-row["stored_bits"], row["perplexity"])):
        yield _quality_row(row)
    for row in rows:
        if row.get("unreachable"):
            yield f"| {row['name']} | out of reach | | | | |"
    yield ""
    yield _ages(rows)
    yield ""
    yield "![KL and perplexity by stored bits](benchmarks/results/quality.png)"
    if data["missing"]:
        yield ""
        yield f"Missing: {'; '.join(missing_by_reason(data['missing']))}."


def _ages(rows: list[dict[str, Any]]) -> str:
    """Which of lowra's rows were measured when: its code has changed in between."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["method"].removesuffix(TUNED) in PRESETS and "date" in row:
            names.setdefault(row["date"], []).append(row["name"])
    told = "; ".join(f"{date}: {', '.join(names[date])}" for date in sorted(names))
    return f"lowra's rows are of the code of their day. {told}."


def _quality_row(row: dict[str, Any]) -> str:
    ours = row["method"].removesuffix(TUNED) in PRESETS
    name = f"**lowra: {row['name']}**" if ours else row["name"]
    adapted = row.get("perplexity_with_adapter")
    beside = " | " if adapted is None else f"{row['adapter_bits']:.3f} | {adapted:,.2f}"
    return (
        f"| {name} | {row['stored_bits']:.3f} | {row['perplexity']:,.2f} | {row['kl']:.3f} | "
        f"{beside} |"
    )


def demo(data: dict[str, Any]) -> Iterator[str]:
    """What `make demo` printed."""
    yield "What `make demo` prints, on 2 CPU cores (`benchmarks/results/demo.json`):"
    yield ""
    yield "| model | stored bits | file | perplexity | KL | with LoRA start |"
    yield "|---|---|---|---|---|---|"
    for row in data["rows"]:
        adapted = row.get("perplexity_with_adapter")
        yield (
            f"| {row['model']} | {row['stored_bits']:.3f} | {row['bytes'] / 1e6:.0f} MB | "
            f"{row['perplexity']:.2f} | {row['kl']:.3f} | "
            f"{'' if adapted is None else format(adapted, '.2f')} |"
        )
    training, seconds = data["training"], data["seconds"]["total"]
    yield ""
    yield (
        f"Then {training['steps']} steps of LoRA at {training['bits']:g} bits: held-out perplexity "
        f"{training['perplexity_before']:.2f} to {training['perplexity_after']:.2f}. "
        f"{seconds:.0f} s in all, after loading the model. ({data['environment']['date']}.)"
    )


def compile_time(data: dict[str, Any]) -> Iterator[str]:
    """Where the seconds of one compile go."""
    spent, where = data["seconds"], data["environment"]
    steps = ", ".join(
        f"`{name}` {spent[name]:.0f}"
        for name in spent
        if spent[name] >= 0.5 and ("-" in name or name in ("capture", "calibration"))
    )
    yield (
        f"One compile of {data['model']} at {data['bit_budget']:g} bits takes {spent['total']:.0f} "
        f"s on {where['cores']} cores ({where['processor']}, {where['date']}): {steps}. Its peak "
        f"memory is {data['peak_ratio']:.1f} times the float32 model."
    )


if __name__ == "__main__":
    main()
