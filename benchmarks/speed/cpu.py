"""Speed on this CPU: kernels, passes, whole models, and peers in the same run.

    python -m benchmarks.speed.cpu [--only PART ...] [--model FOLDER]

Parts: products, lora, activations, tables, onnx, passes, start, model.

All comparisons take turns and tell the least time of each side. `model` needs SmolLM2-135M as
`lowra compile` wrote it (`--model`), peft for the dense LoRA step, and llama-cpp-python for
llama.cpp; what is missing is named. Writes benchmarks/results/speed_cpu.json, in which parts that
were not asked for stay as they are. Load the machine with nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import lowra
from benchmarks.quality.peers.llamacpp_file import run_llama_quantize
from benchmarks.results_file import FOLDER, environment, write_results
from benchmarks.speed import models, passes, products
from lowra.compiler.progress import show_progress, stage
from lowra.workflows.evaluate import held_out_english, windows
from lowra.workflows.models import fetch_smollm2, load_model

LLAMA_FILES = ("Q4_0", "Q2_K")


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    console = Console()
    with show_progress():
        for name in arguments.only:
            with stage(name, None):
                result = PARTS[name](arguments)
            path = keep(name, result)
            show(console, name, result)
    console.print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed on this CPU.")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as lowra compile wrote it")
    return parser.parse_args()


def keep(name: str, result: Any) -> Path:
    """Put one part into the results, with the machine and the date that it is of."""
    path = FOLDER / "speed_cpu.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    when = {"date": datetime.date.today().isoformat(), "threads": torch.get_num_threads()}
    parts[name] = {**when, "processor": environment()["processor"], "result": result}
    return write_results("speed_cpu", {"parts": dict(sorted(parts.items()))})


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.model is None:
        return {"missing": "give --model, a folder that lowra compile wrote"}
    if (lacking := models.peft_missing()) is not None:
        return {"missing": lacking}
    dense, _ = load_model(fetch_smollm2())
    compressed: Any = lowra.load(arguments.model)
    result = models.whole_model(dense, compressed, 5 * arguments.seconds)
    return {"stored_bits": compressed.lowra.report["totals"]["stored_bits"], **result, **_llama()}


def _activations(arguments: argparse.Namespace) -> dict[str, Any]:
    """Products by what they read activations as and, with a model, what that does to its output."""
    result: dict[str, Any] = {"products": products.read_as(arguments.seconds)}
    if arguments.model is not None:
        dense, tokenizer = load_model(fetch_smollm2())
        compressed: Any = lowra.load(arguments.model)
        text = windows(held_out_english(), tokenizer, count=16, context=512)
        result["stored_bits"] = compressed.lowra.report["totals"]["stored_bits"]
        result["kl"] = models.divergences(dense, compressed, text)
    return result


def _llama() -> dict[str, Any]:
    """llama.cpp on the same model and threads, in the file it came in and in smaller ones."""
    if (lacking := models.llama_missing()) is not None:
        return {"llama_cpp": {"missing": lacking}}
    source = fetch_smollm2()
    written = {"Q4_1": models.llama_tokens_per_second(source)}
    with tempfile.TemporaryDirectory() as folder:
        for kind in LLAMA_FILES:
            file = Path(folder) / f"{kind}.gguf"
            run_llama_quantize(source, file, kind, {})
            written[kind] = models.llama_tokens_per_second(file)
    return {"llama_cpp": {"tokens_per_second": written}}


def _onnx(arguments: argparse.Namespace) -> Any:
    lacking = products.onnx_missing()
    return {"missing": lacking} if lacking else products.beside_onnx(arguments.seconds)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "products": lambda a: products.products(a.seconds),
    "lora": lambda a: products.with_lora(a.seconds),
    "activations": _activations,
    "tables": lambda a: products.table_gradients(a.seconds),
    "onnx": _onnx,
    "passes": lambda a: passes.passes(a.seconds),
    "start": lambda _: passes.start(),
    "model": _model,
}


def show(console: Console, name: str, result: Any) -> None:
    """A table of flat rows; anything else as JSON."""
    if not isinstance(result, list):
        console.print_json(json.dumps(result))
        return
    flat = [_flat(row) for row in result]
    table = Table(title=name)
    for column in flat[0]:
        table.add_column(column, justify="right")
    for row in flat:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in row.items():
        made |= value if isinstance(value, Mapping) else {key: value}
    return made


if __name__ == "__main__":
    main()
