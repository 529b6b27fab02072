"""Adapters: how many are served at once, and what is left of one after it was compressed.

    python -m benchmarks.adapters serve COMPILED_MODEL --name 'SmolLM2-135M at 2 bits'
    python -m benchmarks.adapters gain [--bases nf4 "default 2"] [--tasks wikitext gsm8k python]

`gain` trains adapters, compresses them by every method and evaluates each; what is done is kept in
`--work-dir` and in the results, and the same command goes on. NF4 comes with
`pip install '.[bench]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.adapters import gain, serve
from benchmarks.adapters.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("serve", help="memory, swap-in and a mixed batch")
    part.add_argument("model", help="a folder that lowra.save wrote")
    part.add_argument("--name", default="the model", help="what the results call it")
    part.set_defaults(run=serve.run)
    part = parts.add_parser("gain", help="held-out loss kept, by stored bits")
    part.add_argument("--bases", nargs="+", default=["nf4", "default 2"], metavar="BASE")
    part.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    part.add_argument("--seeds", type=int, default=1)
    part.add_argument("--steps", type=int, default=100)
    part.add_argument("--data", type=Path, default=Path("../shared/data"))
    part.add_argument("--work-dir", type=Path, default=Path("lowra-demo/gain-work"))
    part.set_defaults(run=gain.run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
