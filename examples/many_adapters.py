"""One compressed base, many adapters, one batch: what each of them makes of the same prompt.

    lowra compile HuggingFaceTB/SmolLM2-135M small --bits 2
    python examples/many_adapters.py small poems/ packed-math/ --prompt "A compiler is"

An adapter is a folder: packed (`lowra adapter compress`), or PEFT's. Codes are applied as they are
stored; the base is in memory once and is not touched.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import nn

import lowra
from lowra.compiler.errors import LowraError
from lowra.workflows.models import load_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder that lowra.save wrote")
    parser.add_argument("adapters", nargs="+", type=Path, help="folders of adapters")
    parser.add_argument("--prompt", default="A compiler is")
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--pool-mb", type=int, default=256, help="memory for adapters")
    given = parser.parse_args()
    try:
        model, tokenizer = load_model(given.model)
        texts = run(model, tokenizer, given.adapters, given.prompt, given.tokens, given.pool_mb)
    except LowraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, text in texts.items():
        print(f"[{name}] {text}\n")
    return 0


def run(
    model: nn.Module, tokenizer: Any, folders: list[Path], prompt: str, tokens: int, pool_mb: int
) -> dict[str, str]:
    """The text after the prompt by adapter, and that of the base, from one batch."""
    pool = lowra.AdapterPool(model.eval(), pool_mb << 20)
    for folder in folders:
        pool.add(folder.name, folder)
    pool.prefetch(*pool.names)  # in the background, while the prompt is prepared
    choices = [*pool.names, None]
    ids = tokenizer([prompt] * len(choices), return_tensors="pt").input_ids
    written = pool.generate(ids, adapters=choices, max_new_tokens=tokens, do_sample=False)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return dict(zip([*pool.names, "the base"], texts, strict=True))


if __name__ == "__main__":
    sys.exit(main())
