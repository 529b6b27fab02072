"""LoRA on a model below 4 bits in TRL's SFTTrainer, unchanged.

    python examples/finetune_trl.py --bits 2 --steps 30                # SmolLM2-135M, a small task
    python examples/finetune_trl.py --model small/ --data chats.jsonl  # records with `messages`

Needs `pip install 'lowra[train]'`. There is no `peft_config`: a compressed model has its adapters.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import lowra
from lowra.compiler.errors import LowraError
from lowra.runtime.compiled import compiled
from lowra.workflows.models import fetch_smollm2, load_model

Record = dict[str, Any]


def main() -> int:
    arguments = parse_arguments()
    try:
        model, tokenizer = load_model(arguments.model or fetch_smollm2())
        if compiled(model) is None:
            model = lowra.compile(model, bit_budget=arguments.bits)
        run(model, tokenizer, records(arguments.data), arguments.out, arguments.steps)
    except LowraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a compressed folder, or a dense model to compress")
    parser.add_argument("--bits", type=float, default=2.0, help="budget for a dense model")
    parser.add_argument("--data", type=Path, help="JSONL records with `messages` or `text`")
    parser.add_argument("--out", type=Path, default=Path("lowra-sft"))
    parser.add_argument("--steps", type=int, default=30)
    return parser.parse_args()


def records(path: Path | None) -> list[Record]:
    """What TRL takes: records with `messages`, or with `text`."""
    if path is not None:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    return [sum_of(a, b) for a in range(2, 30) for b in range(2, 12)]


def sum_of(a: int, b: int) -> Record:
    """One conversation of a task that a small model learns in a few steps."""
    return {"messages": [
        {"role": "user", "content": f"What is {a} plus {b}?"},
        {"role": "assistant", "content": f"{a} plus {b} is {a + b}."},
    ]}  # fmt: skip


def run(
    model: nn.Module, tokenizer: Any, data: list[Record], out: Path, steps: int, batch: int = 4,
    **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Train and save; the held-out loss before and after."""
    set_seed(0)
    print(lowra.prepare_training(model))
    parts = Dataset.from_list(data).train_test_split(test_size=0.1, seed=0)
    settings: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"), "max_steps": steps, "learning_rate": 5e-4,
        "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch,
        "logging_steps": max(1, steps // 10), "save_steps": steps, "report_to": [],
        "use_cpu": not torch.cuda.is_available(),  # bf16, which SFTConfig turns on, works there too
    }  # fmt: skip
    trainer = SFTTrainer(
        model, SFTConfig(**(settings | options)), train_dataset=parts["train"],
        eval_dataset=parts["test"], processing_class=tokenizer,
    )  # fmt: skip
    with lowra.half_products(trainer.model):  # many times faster on a CPU without AVX-512
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
    path = lowra.save(model.eval(), out / "model", tokenizer=tokenizer, overwrite=True)
    print(f"held-out loss {before:.3f} -> {after:.3f}; wrote {path}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    sys.exit(main())
