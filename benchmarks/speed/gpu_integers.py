"""What reading activations as integers on a GPU costs in exactness, on a real compressed model.

    python -m benchmarks.speed.gpu_integers CHECKPOINT

The meaning of those products (`lowra/backends/reference/integers.py`) in plain torch, products
in float32, in place of every compressed linear of one of two equal models: mean KL of the two over
windows of held-out English, and the perplexity of each. A checkpoint without a tokenizer is taken
for one of SmolLM2-135M. Nothing is timed and no GPU is needed. Writes
benchmarks/results/speed_gpu_integers.json.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.results_file import write_results
from lowra.backends.reference.integers import inputs_as_read, weight_as_read
from lowra.backends.reference.linear import stored_rows
from lowra.compiler.rotation import Rotation, rotate
from lowra.runtime.modules import QuantizedLinear, low_rank
from lowra.workflows.evaluate import evaluate, held_out_english, windows
from lowra.workflows.models import fetch_smollm2, load_model

WINDOWS, CONTEXT = 8, 256
KINDS = ("unrounded", "int16", "int8")
"""Unrounded: how far the same computation lies from the CPU's without any integers."""


def read_as(model: nn.Module, kind: str) -> None:
    """From now on `model` multiplies as the kernels would."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.product = _product(module, kind)  # type: ignore[method-assign]


def _product(module: QuantizedLinear, kind: str) -> Any:
    if module.correction is not None:
        raise SystemExit("a model with corrections is not measured: they would be left out")
    packed, fine, exact = module.packed(), kind == "int16", kind == "unrounded"
    weight = stored_rows(*packed[:7], torch.float32) if exact else weight_as_read(packed, fine)
    weight, rotation = weight.float(), Rotation(*packed[7:9])

    def product(x: Tensor, bias: Tensor | None, factors: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        turned = rotate(rows.float(), rotation).to(x.dtype)
        read = turned.float() if exact else inputs_as_read(turned, fine).float()
        y = (read @ weight.T).view(*x.shape[:-1], -1)
        if bias is not None:
            y += bias
        y = y.to(x.dtype)
        return y if factors is None else y + low_rank(x, *factors).to(x.dtype)

    return product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    options = parser.parse_args()
    plain, tokenizer = load_model(options.checkpoint)
    tokenizer = tokenizer or load_model(fetch_smollm2())[1]
    text = windows(held_out_english(), tokenizer, count=WINDOWS, context=CONTEXT)
    rows: list[dict[str, Any]] = [
        {"activations": "as they are", "kl": 0.0, "perplexity": evaluate(plain, text).perplexity}
    ]
    for kind in KINDS:
        model, _ = load_model(options.checkpoint)
        read_as(model, kind)
        found = evaluate(model, text, reference=plain)
        rows.append({"activations": kind, "kl": found.kl, "perplexity": found.perplexity})
    table = Table(title="integers on a GPU, computed by plain torch")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.5g}" if isinstance(v, float) else str(v) for v in row.values()))
    console = Console()
    console.print(table)
    shape = {"windows": WINDOWS, "context": CONTEXT, "stored_bits": stored_bits(plain)}
    path = write_results("speed_gpu_integers", {**shape, "rows": rows})
    console.print(f"wrote {path}")


def stored_bits(model: nn.Module) -> float:
    """Per compressed weight."""
    stored = [m.stored() for m in model.modules() if isinstance(m, QuantizedLinear)]
    return sum(s.stored_bits() for s in stored) / sum(s.weights for s in stored)


if __name__ == "__main__":
    main()
