"""What adapters are trained for, and the held-out part that they are judged on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowra.compiler.half_products import half_products
from lowra.workflows.evaluate import windows
from lowra.workflows.models import inference

CONTEXT, TRAIN_ROWS, TEST_ROWS = 512, 400, 8
IGNORED = -100


class Rows(NamedTuple):
    """int64 [rows, CONTEXT] each; labels of what is not scored are -100."""

    ids: Tensor
    labels: Tensor


class Examples(NamedTuple):
    train: Rows
    test: Rows


def wikitext(data: Path, tokenizer: Any) -> Examples:
    """WikiText-2's style: trained on `valid`, judged on `test`, every token."""
    made = []
    for part, count in (("valid", TRAIN_ROWS), ("test", TEST_ROWS)):
        ids = windows((data / f"wikitext2-{part}.txt").read_text(), tokenizer, count=count,
                      context=CONTEXT)  # fmt: skip
        made.append(Rows(ids, ids))
    return Examples(*made)


def gsm8k(data: Path, tokenizer: Any) -> Examples:
    """Answers to grade-school problems; the questions are not scored."""
    made = []
    for part, count in (("train", TRAIN_ROWS), ("test", TEST_ROWS)):
        lines = (data / f"gsm8k-{part}.jsonl").read_text(encoding="utf-8").split("\n")
        records = [json.loads(line) for line in lines if line]
        pairs = ((f"Question: {r['question']}\nAnswer: ", r["answer"] + "\n\n") for r in records)
        made.append(packed(pairs, tokenizer, count))
    return Examples(*made)


def python(data: Path, tokenizer: Any) -> Examples:
    """HumanEval's solutions after their headers; every fourth task is held out."""
    with gzip.open(data / "HumanEval.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    pairs = [(r["prompt"], r["canonical_solution"] + "\n\n") for r in records]
    train = [pair for i, pair in enumerate(pairs) if i % 4]
    return Examples(
        packed(train, tokenizer, TRAIN_ROWS), packed(pairs[::4], tokenizer, 2 * TEST_ROWS)
    )


TASKS: dict[str, Callable[[Path, Any], Examples]] = {
    "wikitext": wikitext, "gsm8k": gsm8k, "python": python,
}  # fmt: skip


def packed(pairs: Iterable[tuple[str, str]], tokenizer: Any, most: int) -> Rows:
    """Prompts, not scored, and answers, one behind the other, cut into at most `most` rows."""
    ids: list[int] = []
    labels: list[int] = []
    for prompt, answer in pairs:
        asked, told = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer)
        )
        ids += [*asked, *told]
        labels += [*([IGNORED] * len(asked)), *told]
        if len(ids) >= most * CONTEXT:
            break
    rows = min(most, len(ids) // CONTEXT)
    shaped = (torch.tensor(x[: rows * CONTEXT]).view(rows, CONTEXT) for x in (ids, labels))
    return Rows(*shaped)


def loss_of(model: Any, rows: Rows) -> float:
    """Mean negative log likelihood of the labels."""
    total, count = 0.0, 0
    with inference(model), half_products():
        for ids, labels in zip(rows.ids, rows.labels, strict=True):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
            losses = nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            total, count = total + float(losses), count + int((labels[1:] >= 0).sum())
    return total / count
