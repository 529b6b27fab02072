"""What one training step takes in memory, measured on the process, each base in one of its own.

Weights are random, of a model's shapes: memory depends on no value. Peak memory is that of the
second step (the optimiser's state is there by then) over what the process had before there was a
model; what weights, adapters, gradients and AdamW hold is counted from their tensors, and the rest
of the peak is activations, logits and what kernels need on the way.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.finetune.bases import RANK, with_lora
from benchmarks.quality.protocol import sites_of
from benchmarks.results_file import write_results
from lowra.compiler.half_products import half_products
from lowra.runtime.modules import QuantizedLinear
from lowra.workflows.bench import random_weight

NAME = "finetune_memory"
BASES = ("lora", "qlora", "lowra 4", "lowra 2", "lowra 1")
SHAPES = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""SmolLM2-135M, and two of the 32 layers of Llama-2-7B."""
PARTS = ("weights", "adapters", "gradients", "optimizer", "rest")
Row = dict[str, Any]


def run(arguments: Any) -> None:
    if arguments.one:
        shapes, base = arguments.one.split("/")
        print(json.dumps(step_memory(shapes, base, arguments.tokens)))
        return
    console, rows = Console(), []
    for shapes in arguments.shapes:
        for base in arguments.bases:
            rows.append(_in_a_process(shapes, base, arguments.tokens))
            console.print(f"{shapes}, {base}: {rows[-1]['peak'] / 1e6:,.0f} MB")
    write_results(NAME, {"tokens": arguments.tokens, "rank": RANK, "rows": rows})
    console.print(table_of(rows))


def _in_a_process(shapes: str, base: str, tokens: int) -> Row:
    command = [sys.executable, "-m", "benchmarks.finetune", "memory", "--one", f"{shapes}/{base}"]
    done = subprocess.run(
        [*command, "--tokens", str(tokens)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def step_memory(shapes: str, base: str, tokens: int) -> Row:
    """Bytes by part, and the seconds of the step, of `base` in this process."""
    torch.manual_seed(0)
    ids = torch.randint(0, 30000, (1, tokens))
    before = _memory("VmRSS")
    model = _model(shapes, base)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters)
    _step(model, optimizer, ids)
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    _step(model, optimizer, ids)
    seconds, peak = time.perf_counter() - start, _memory("VmHWM") - before
    parts = {
        "weights": _bytes(_frozen(model)), "adapters": _bytes(adapters),
        "gradients": _bytes(adapters),
        "optimizer": _bytes(t for state in optimizer.state.values() for t in state.values()),
    }  # fmt: skip
    rest = peak - sum(parts.values())
    linears = sum(site.in_features * site.out_features for site in sites_of(model).values())
    return {"shapes": shapes, "base": base, "weights_in_linears": linears, "peak": peak,
            "seconds": seconds, **parts, "rest": rest}  # fmt: skip


def _step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    with half_products(model):  # bfloat16 bases would take minutes on a CPU without AVX-512
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _model(shapes: str, base: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shapes])).to(torch.bfloat16)
    kind, _, width = base.partition(" ")
    if kind != "lora":
        for name in sites_of(model):
            parent, _, leaf = name.rpartition(".")
            site = getattr(model.get_submodule(parent), leaf)
            setattr(model.get_submodule(parent), leaf, _layer(site, kind, width))
    if kind != "lowra":
        model = with_lora(model.requires_grad_(False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    _give_back()
    return model.train()


def _layer(site: nn.Linear, kind: str, width: str) -> nn.Module:
    n, k = site.weight.shape
    if kind == "lowra":
        a, b = torch.randn(RANK, k) / math.sqrt(k), torch.zeros(n, RANK)
        layer = QuantizedLinear(random_weight(n, k, float(width)), None, torch.bfloat16)
        layer.set_adapter(a, b, 1.0)
        return layer
    return nf4_layer(site)


def nf4_layer(site: nn.Linear) -> nn.Module:
    """bitsandbytes' layer with NF4 weights, their scales quantised too."""
    import bitsandbytes

    n, k = site.weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        site.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True,
        module=layer,
    )  # fmt: skip
    return layer.to("cpu")


def _frozen(model: nn.Module) -> Iterable[Tensor]:
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if not tensor.requires_grad:
                yield tensor
        state = getattr(getattr(module, "weight", None), "quant_state", None) if (
            type(module).__name__ == "Linear4bit"
        ) else None  # fmt: skip
        if state is not None:
            nested = state.state2
            yield from (t for t in (state.absmax, nested and nested.absmax) if t is not None)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


def _memory(field: str) -> int:
    """Bytes that Linux reports for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _give_back() -> None:
    """Free memory goes back to the system, so that it does not count."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def table_of(rows: list[Row]) -> Table:
    table = Table(title="One training step, MB")
    for column in ("shapes", "base", "peak", *PARTS, "seconds"):
        table.add_column(column, justify="left" if column in ("shapes", "base") else "right")
    for row in rows:
        figures = [f"{row[part] / 1e6:,.0f}" for part in ("peak", *PARTS)]
        table.add_row(row["shapes"], row["base"], *figures, f"{row['seconds']:.2f}")
    return table
