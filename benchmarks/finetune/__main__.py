"""Fine-tuning on bases of every size.

    python -m benchmarks.finetune quality [--bases original "default 2" ...] [--task gsm8k]
    python -m benchmarks.finetune memory [--bases lora qlora "lowra 2"] [--shapes smollm2 llama-7b]

`quality` trains one rank-16 adapter on each base with the same rows, steps and rate, and gives
the perplexity of held-out text by stored bits. `memory` measures what one training step takes, each
base in a process of its own. Peers come with `pip install '.[bench]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.finetune import memory, quality


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("quality", help="perplexity after the same training")
    part.add_argument("--bases", nargs="+", default=list(quality.BASES), metavar="BASE")
    part.add_argument(
        "--optimizers", nargs="+", default=["adamw"], choices=list(quality.RATES), metavar="NAME"
    )
    part.add_argument("--rate", type=float, help="in place of each optimiser's own")
    part.add_argument("--task", default=quality.WIKITEXT, choices=list(quality.TASKS))
    part.add_argument("--steps", type=int, default=100)
    part.add_argument("--seeds", type=int, default=1)
    part.add_argument("--rerun", action="store_true", help="measure rows that are there, too")
    part.add_argument("--data", type=Path, default=Path("../shared/data"))
    part.add_argument("--work-dir", type=Path, default=Path("lowra-demo/quality-work"))
    part.set_defaults(run=quality.run)
    part = parts.add_parser("memory", help="peak memory of a training step")
    part.add_argument("--bases", nargs="+", default=list(memory.BASES), metavar="BASE")
    part.add_argument("--shapes", nargs="+", default=list(memory.SHAPES), choices=memory.SHAPES)
    part.add_argument("--tokens", type=int, default=512)
    part.add_argument("--one", help=argparse.SUPPRESS)
    part.set_defaults(run=memory.run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
