"""Whole models of an 8B Llama's shapes on a GPU: tokens per second, and a LoRA step.

    python -m benchmarks.speed.gpu_models [--layers 32]

Weights are random: time and memory depend on no value. Writing is greedy, by replay of a CUDA graph
of one token over a static cache (models by turns), and by `generate` as people call it. A step is a
row of 512 tokens, rank 16 at every linear but the head, AdamW, one model at a time; its peak is
what torch allocated. Without bitsandbytes there is no QLoRA beside them. Writes
benchmarks/results/speed_gpu_models.json. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune.bases import RANK, with_lora
from benchmarks.finetune.memory import nf4_layer
from benchmarks.quality.protocol import sites_of
from benchmarks.results_file import write_results
from benchmarks.speed.gpu_kernels import refuse_replaced, require_kernels
from benchmarks.speed.models import lora_step
from lowra.runtime.checkpoint_reader import unfilled
from lowra.runtime.modules import QuantizedLinear
from lowra.workflows.bench import random_weight, tokens_per_second
from lowra.workflows.generated_calibration import cache_argument
from lowra.workflows.gpu_timing import TURNS, seconds_of

NAME = "speed_gpu_models"
SHAPES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
WIDTHS: dict[str, tuple[float, ...]] = {"lowra 2": (2,), "lowra 1.5": (2, 1)}
BATCHES, PROMPT, WRITTEN, PER_GRAPH = (1, 16), 128, 32, 8
STEP_TOKENS, STEPS = 512, 5
Row = dict[str, Any]


def kinds() -> list[str]:
    return ["bf16", *WIDTHS, *(["nf4"] if find_spec("bitsandbytes") else [])]


def built(kind: str, shapes: dict[str, Any], device: str) -> Any:
    """A Llama of random weights on `device`, its linears but the head of `kind`; no adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = unfilled(LlamaForCausalLM, LlamaConfig(**shapes))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
    make = _layers(kind, device)
    for name in list(sites_of(model)):
        if make is None:
            break
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, leaf, make(getattr(holder, leaf)))
    return model.requires_grad_(False).eval()


def _layers(kind: str, device: str) -> Callable[[nn.Linear], nn.Module] | None:
    """What takes a linear's place; None where it stays. Equal shapes share codes, not memory."""
    if kind == "bf16":
        return None
    if kind == "nf4":
        return lambda site: nf4_layer(site).to(device)
    weights: dict[tuple[int, int], Any] = {}

    def packed(site: nn.Linear) -> nn.Module:
        n, k = site.weight.shape
        if (n, k) not in weights:
            weights[n, k] = random_weight(n, k, *WIDTHS[kind])
        layer = QuantizedLinear(weights[n, k], None, torch.bfloat16)
        return copy.deepcopy(layer).to(device)

    return packed


class Writer:
    """Greedy writing over a static cache, one token a call, always in the same memory."""

    def __init__(self, model: Any, batch: int, prompt: int, room: int) -> None:
        from transformers import StaticCache

        self.model = model
        cache = StaticCache(config=model.config, max_cache_len=prompt + room)
        self.given = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=draw)
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), **self.given).logits
        self.token = logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def __call__(self, _: int = 0) -> Tensor:
        logits = self.model(input_ids=self.token, **self.given).logits
        return self.token.copy_(logits[:, -1:].argmax(-1))


def writing(models: dict[str, Any], batch: int) -> dict[str, float]:
    """Tokens per second of all sequences together, by replay."""
    room = 2 + PER_GRAPH * (TURNS + 1)
    writers = {name: Writer(model, batch, PROMPT, room) for name, model in models.items()}
    seconds = seconds_of({name: (writer, PER_GRAPH) for name, writer in writers.items()})
    return {name: batch / found for name, found in seconds.items()}


def stepping(kind: str, shapes: dict[str, Any], tokens: int, steps: int, device: str) -> Row:
    """Median seconds of a step and its peak of memory in bytes; what the weights hold of it."""
    model = with_adapters(kind, built(kind, shapes, device))
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    ids = torch.randint(shapes["vocab_size"], (1, tokens), device=device)
    step = lora_step(model.train(), ids)
    seconds = []
    for turn in range(2 + steps):
        if device == "cuda" and turn == 2:
            torch.cuda.reset_peak_memory_stats()
        seconds.append(_timed(step, device))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"seconds": sorted(seconds[2:])[steps // 2], "peak_bytes": peak, "held_bytes": held}


def with_adapters(kind: str, model: Any) -> Any:
    """Rank-16 adapters in float32 at every linear but the head; nothing else trains."""
    if kind not in WIDTHS:
        return with_lora(model)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            a = torch.randn(RANK, layer.k, device=layer.codes.device) / math.sqrt(layer.k)
            layer.set_adapter(a, torch.zeros(layer.n, RANK, device=a.device), 1.0)
    return model


def _timed(step: Callable[[int], object], device: str) -> float:
    if device != "cuda":
        step(0)
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(0)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    layers = parser.parse_args().layers
    require_kernels()
    shapes = {**SHAPES, "num_hidden_layers": layers}
    found: Row = {
        "gpu": torch.cuda.get_device_name(), "layers": layers, "prompt": PROMPT,
        "step_tokens": STEP_TOKENS, "rank": RANK, "writing": {}, "generate": {}, "steps": {},
    }  # fmt: skip
    models = {kind: built(kind, shapes, "cuda") for kind in kinds()}
    parts: list[tuple[str, str, Callable[[], Any]]] = [
        ("writing", str(batch), lambda batch=batch: writing(models, batch)) for batch in BATCHES
    ]
    ids = torch.randint(SHAPES["vocab_size"], (1, PROMPT), device="cuda")
    parts.append(("generate", "1", lambda: tokens_per_second(models, ids, WRITTEN)))
    for part, name, measure in parts:
        _measure(found, part, name, measure)
    models.clear()
    for kind in kinds():
        free()
        step = functools.partial(stepping, kind, shapes, STEP_TOKENS, STEPS, "cuda")
        _measure(found, "steps", kind, step)


def _measure(found: Row, part: str, name: str, measure: Callable[[], Any]) -> None:
    """One more result, or the error in its place: what is measured already is never lost."""
    try:
        found[part][name] = measure()
        refuse_replaced()
    except Exception as error:
        found[part][name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(part, name, found[part][name], flush=True)
    write_results(NAME, found)


if __name__ == "__main__":
    main()
