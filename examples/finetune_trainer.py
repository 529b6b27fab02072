"""LoRA on a model below 4 bits in transformers' Trainer, unchanged.

    python examples/finetune_trainer.py --bits 2 --steps 60            # SmolLM2-135M
    python examples/finetune_trainer.py --model small/ --data my.txt   # what `lowra compile` wrote

Needs `pip install 'lowra[train]'`. The run can be cut and started again: it goes on at the last
checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lowra
from lowra.compiler.errors import LowraError
from lowra.runtime.compiled import compiled
from lowra.workflows.evaluate import held_out_english
from lowra.workflows.models import fetch_smollm2, load_model


def main() -> int:
    arguments = parse_arguments()
    try:
        model, tokenizer = load(arguments.model, arguments.bits)
        text = arguments.data.read_text() if arguments.data else held_out_english()
        run(model, tokenizer, text, arguments.out, arguments.steps, arguments.context)
    except LowraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a compressed folder, or a dense model to compress")
    parser.add_argument("--bits", type=float, default=2.0, help="budget for a dense model")
    parser.add_argument("--data", type=Path, help="a text file; by default Python's documentation")
    parser.add_argument("--out", type=Path, default=Path("lowra-finetune"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--context", type=int, default=256)
    return parser.parse_args()


def load(source: str | None, bits: float) -> tuple[nn.Module, Any]:
    """A compressed model, and its tokenizer; a dense one is compressed first."""
    model, tokenizer = load_model(source or fetch_smollm2())
    if compiled(model) is None:
        model = lowra.compile(model, bit_budget=bits)
    return model, tokenizer


def run(
    model: nn.Module, tokenizer: Any, text: str, out: Path, steps: int, context: int = 256,
    batch: int = 4,
) -> dict[str, float]:  # fmt: skip
    """Train, keep the best, save; the held-out loss before and after."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    rows = [ids[start : start + context] for start in range(0, len(ids) - context + 1, context)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    kept = max(1, len(data) // 10)
    print(lowra.prepare_training(model))  # adapters in float32; the base stays as it is
    options = TrainingArguments(
        output_dir=str(out / "checkpoints"), max_steps=steps, learning_rate=2e-4,
        per_device_train_batch_size=batch, per_device_eval_batch_size=batch,
        lr_scheduler_type="cosine", eval_strategy="steps", eval_steps=max(1, steps // 4),
        save_steps=max(1, steps // 4), save_total_limit=2, load_best_model_at_end=True,
        logging_steps=max(1, steps // 10), report_to=[],
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=data[:-kept], eval_dataset=data[-kept:])
    found = (out / "checkpoints").is_dir() and get_last_checkpoint(str(out / "checkpoints"))
    with lowra.half_products(trainer.model):  # many times faster on a CPU without AVX-512
        before = trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=found or None)
        after = trainer.evaluate()["eval_loss"]
    path = lowra.save(model.eval(), out / "model", tokenizer=tokenizer, overwrite=True)
    print(f"held-out loss {before:.3f} -> {after:.3f}; wrote {path}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    sys.exit(main())
