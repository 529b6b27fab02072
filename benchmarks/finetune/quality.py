"""Perplexity after the same fine-tuning, by what the frozen base stores."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.adapters.tasks import TASKS, Rows, loss_of
from benchmarks.finetune.bases import RANK, base_of
from benchmarks.finetune.chart import draw
from benchmarks.quality.protocol import Task, smollm2_task
from benchmarks.quality.rows import code_version
from benchmarks.results_file import FOLDER, write_results
from lowra.compiler.half_products import half_products
from lowra.compiler.progress import show_progress, stage
from lowra.optim import LoRARite, OPLoRA
from lowra.workflows.evaluate import evaluate, windows

NAME = "finetune_quality"
BASES = (
    "original", "nf4", "loftq-4", "loftq-2",
    *(f"{p} {b:g}" for b in (4, 3, 2.5, 2, 1.75, 1.5, 1.25, 1.15) for p in ("default", "lowra")),
)  # fmt: skip
CONTEXT, ROWS, TEST_WINDOWS = 512, 400, 8
WIKITEXT = "wikitext"
RATES = {"adamw": 1e-3, "lora-rite": 1e-3, "oplora": 1.0}


def run(arguments: Any) -> None:
    """Measure the rows asked for; each is written as soon as it is there."""
    console = Console()
    task = smollm2_task(arguments.data, arguments.work_dir)
    rows = _known()
    with show_progress():
        for base, optimizer, seed in itertools.product(
            arguments.bases, arguments.optimizers, range(arguments.seeds)
        ):
            rate = arguments.rate or RATES[optimizer]
            key = f"{base} / {optimizer} {rate:g} / {arguments.steps} steps / seed {seed}"
            key = key if arguments.task == WIKITEXT else f"{arguments.task}: {key}"
            if key in rows and not arguments.rerun:
                continue
            text = _texts(arguments.task, arguments.data, task)
            rows[key] = measure(task, base, optimizer, rate, arguments.steps, seed, text)
            write_results(NAME, {"protocol": protocol(), "rows": rows})
    console.print(table_of(rows), *draw({"rows": rows}, FOLDER), sep="\n")


def protocol() -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct (bfloat16)", "train": f"WikiText-2 valid, {ROWS} rows",
        "test": f"WikiText-2 test, {TEST_WINDOWS} x 1024 tokens",
        "gsm8k": "answers of GSM8K, 400 rows of train, 8 of test; questions are not scored",
        "batch": f"1 x {CONTEXT} tokens",
        "adapter": f"rank {RANK}, alpha {RANK}, every linear but the head, float32",
        "schedule": "linear warm-up over a tenth, then cosine to 0; gradient norm at most 1",
    }  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """Rows to train on, and how the outcome is judged."""

    task: str
    train: Rows
    perplexity: Callable[[nn.Module], float]


def _texts(name: str, data: Path, task: Task) -> Texts:
    """WikiText: every token of longer windows counts. Other tasks: the tokens of their answers."""
    if name == WIKITEXT:
        text = (data / "wikitext2-valid.txt").read_text()
        rows = windows(text, task.tokenizer, count=ROWS, context=CONTEXT)
        test = task.test[:TEST_WINDOWS]
        return Texts(name, Rows(rows, rows), lambda m: evaluate(m, test, batch=1).perplexity)
    examples = TASKS[name](data, task.tokenizer)
    return Texts(name, examples.train, lambda model: math.exp(loss_of(model, examples.test)))


def measure(
    task: Task, name: str, optimizer: str, rate: float, steps: int, seed: int, texts: Texts
) -> dict[str, Any]:
    torch.manual_seed(seed)
    base = base_of(name, task)
    before = texts.perplexity(base.model.eval())
    start = time.perf_counter()
    rows = texts.train
    losses = train(base.model, rows.ids, optimizer, rate, steps, seed, labels=rows.labels)
    seconds = time.perf_counter() - start
    return {
        "task": texts.task, "base": name, "optimizer": optimizer, "rate": rate,
        "steps": steps, "seed": seed,
        "stored_bits": base.stored_bits, "perplexity_before": before,
        "perplexity": texts.perplexity(base.model.eval()), "losses": losses,
        "seconds_per_step": seconds / steps, "version": code_version(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def train(
    model: Any, rows: Tensor, optimizer: str, rate: float, steps: int, seed: int,
    labels: Tensor | None = None,
) -> list[float]:  # fmt: skip
    """Losses of `steps` steps, one row each, in an order drawn by `seed`; of all tokens, or of the
    `labels` of these rows."""
    wanted = rows if labels is None else labels
    moved = [p for p in model.parameters() if p.requires_grad]
    makers = {
        "adamw": lambda: torch.optim.AdamW(moved, lr=rate, weight_decay=0.0),
        "lora-rite": lambda: LoRARite(model, lr=rate),
        "oplora": lambda: OPLoRA(model, lr=rate),
    }
    chosen = makers[optimizer]()
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        chosen,
        lambda s: min((s + 1) / warm, (1 + math.cos(math.pi * max(0, s - warm) / steps)) / 2),
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    losses = []
    model.train()
    with stage(f"train with {optimizer}", steps) as bar, half_products():
        for step in range(steps):
            at = int(order[step % len(order)])
            given = {"input_ids": rows[at : at + 1], "labels": wanted[at : at + 1]}
            loss = model(**given, use_cache=False).loss
            loss.backward()
            if optimizer == "adamw":
                torch.nn.utils.clip_grad_norm_(moved, 1.0)
            chosen.step()
            schedule.step()
            chosen.zero_grad()
            losses.append(round(float(loss.detach()), 4))
            bar.advance()
    return losses


def _known() -> dict[str, Any]:
    path = FOLDER / f"{NAME}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def task_of(row: Mapping[str, Any]) -> str:
    """Rows from before there was a second task name none."""
    return row.get("task", WIKITEXT)


def table_of(rows: dict[str, Any]) -> Table:
    table = Table(title="Perplexity of held-out text after fine-tuning")
    for column in ("task", "base", "optimizer"):
        table.add_column(column)
    for column in ("stored bits", "steps", "seed", "before", "after"):
        table.add_column(column, justify="right")
    for row in sorted(rows.values(), key=lambda row: -row["stored_bits"]):
        numbers = (f"{row[name]:,.2f}" for name in ("perplexity_before", "perplexity"))
        table.add_row(
            task_of(row), row["base"], row["optimizer"], f"{row['stored_bits']:.3f}",
            str(row["steps"]), str(row["seed"]), *numbers,
        )  # fmt: skip
    return table
