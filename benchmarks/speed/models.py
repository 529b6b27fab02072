"""A compressed model beside the dense one: writing, evaluation, a LoRA step; and llama.cpp."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowra.backends.activations import activations
from lowra.workflows.bench import alternate, tokens_per_second
from lowra.workflows.evaluate import evaluate
from lowra.workflows.models import inference

PROMPT, WRITTEN = 16, 64
EVALUATED = 1024
BATCH, CONTEXT, RANK = 2, 256, 16

Row = dict[str, Any]


def whole_model(dense: nn.Module, compressed: nn.Module, seconds: float) -> Row:
    """Tokens per second at batch 1, seconds of an evaluation and of a LoRA step, by turns.

    compressed: with its adapters, rank 16 at every site. `dense` writes without any, and steps with
    peft's LoRA of that rank on the same linears.
    """
    ids = torch.randint(0, 40000, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))
    models = {"compressed": compressed, "dense": dense}
    written = tokens_per_second(models, ids[:1, :PROMPT], WRITTEN)
    text = ids.reshape(1, -1).repeat(1, EVALUATED // ids.numel())
    evaluated = alternate({name: _evaluation(m, text) for name, m in models.items()}, seconds)
    steps = alternate(
        {"compressed": lora_step(compressed, ids), "dense": lora_step(with_peft(dense), ids)},
        seconds,
    )
    return {
        "tokens_per_second": written, "generate_ratio": written["compressed"] / written["dense"],
        "evaluation_seconds": evaluated,
        "evaluation_ratio": evaluated["compressed"] / evaluated["dense"],
        "lora_step_seconds": steps, "lora_step_ratio": steps["compressed"] / steps["dense"],
        "evaluated_tokens": EVALUATED, "step_tokens": BATCH * CONTEXT, "rank": RANK,
    }  # fmt: skip


def divergences(dense: nn.Module, compressed: nn.Module, text: Tensor) -> dict[str, float]:
    """Mean KL to the dense model, by what products read activations as."""
    found: dict[str, float] = {}
    for kind in ("float32", "int16", "int8"):
        with activations(kind):
            found[kind] = evaluate(compressed, text, reference=dense).kl or 0.0
    return found


def _evaluation(model: nn.Module, ids: Tensor) -> Callable[[int], object]:
    def evaluate(_: int) -> object:
        with inference(model):
            return model(ids, use_cache=False).logits

    return evaluate


def lora_step(model: nn.Module, ids: Tensor) -> Callable[[int], object]:
    """One training step of what requires grad."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(_: int) -> object:
        optimizer.zero_grad(set_to_none=True)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        return None

    return step


def with_peft(model: nn.Module) -> nn.Module:
    """A copy of a dense model with peft's LoRA on every linear but the head."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    adapted: Any = get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
    return adapted.to(torch.bfloat16)


def peft_missing() -> str | None:
    return None if find_spec("peft") else "not installed: peft"


def llama_missing() -> str | None:
    return None if find_spec("llama_cpp") else "not installed: llama-cpp-python"


def llama_tokens_per_second(file: Path) -> float:
    """What llama.cpp writes per second at batch 1, on torch's number of threads; best of three."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    with redirect_stderr(StringIO()):
        model = Llama(
            str(file), n_threads=threads, n_threads_batch=threads, n_ctx=512, verbose=False
        )
    prompt = list(range(100, 100 + PROMPT))
    return WRITTEN / min(_llama_seconds(model, prompt) for _ in range(3))


def _llama_seconds(model: Any, prompt: list[int]) -> float:
    """Seconds of WRITTEN tokens, one after the other, after the prompt."""
    model.reset()
    model.eval(prompt)
    token = prompt[-1]
    begun = time.perf_counter()
    for _ in range(WRITTEN):
        model.eval([token])
        token = model.sample(temp=0.0)
    return time.perf_counter() - begun
