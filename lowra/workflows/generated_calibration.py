"""Calibration text that the model writes itself."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lowra.compiler.errors import CalibrationError
from lowra.compiler.half_products import half_products
from lowra.compiler.progress import Stage, stage
from lowra.workflows.decode_attention import decode_attention
from lowra.workflows.models import inference
from lowra.workflows.reserved_cache import reserve

_FIRST_CHOICES = 512
_BLOCK = 256
_CANNOT_WRITE = "and cannot write its own calibration text: pass calibration=..."


def generate_calibration(
    model: Any,
    *,
    tokens: int,
    context: int,
    seed: int,
    batch: int = 64,
    temperature: float = 1.0,
) -> Tensor:
    """Text that `model` writes itself: int64 [tokens // context, context] on the CPU.

    Each window starts with the model's BOS (or EOS, or else a random token), goes on with one of
    the 512 likeliest tokens, all equally likely so that windows differ, and is then sampled at
    `temperature`. `batch` windows are written at a time; their key-value cache is the peak of
    memory. The window is shortened to the positions that the model has, and to `tokens`.
    The same model, seed and sizes give the same tokens. The random state of torch, the training
    flags and the configs stay as they were.

    Raises `CalibrationError` for a model that cannot generate, or that gives NaN.
    """
    if tokens < 1 or context < 1 or batch < 1 or not temperature > 0:
        raise CalibrationError(
            f"cannot generate with tokens={tokens}, context={context}, batch={batch}, "
            f"temperature={temperature}: all must be positive"
        )
    _require_generation(model)
    context = min(context, tokens, _positions(model))
    count = tokens // context
    device = next(model.parameters()).device
    with (
        inference(model),
        decode_attention(model),
        half_products(model),
        _own_random_state(device, seed) as generator,
        stage("Write calibration text", count * context) as progress,
    ):
        parts = []
        for done in range(0, count, batch):
            starts = _starts(model, min(batch, count - done), device, generator)
            parts.append(_write(model, starts, context, temperature, generator, progress))
    return torch.cat(parts).cpu()


def _require_generation(model: Any) -> None:
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise CalibrationError(f"{name} is an encoder-decoder, {_CANNOT_WRITE}")
    if not hasattr(model, "can_generate") or not model.can_generate():
        raise CalibrationError(f"{name} does not generate text, {_CANNOT_WRITE}")


def _positions(model: Any) -> int:
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 2**31


@contextmanager
def _own_random_state(device: torch.device, seed: int) -> Generator[torch.Generator, None, None]:
    """A generator seeded with `seed`; torch's global one is restored afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield torch.Generator(device).manual_seed(seed)


def _starts(model: Any, rows: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """First tokens [rows, 1]."""
    config = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        token = token[0] if isinstance(token, list | tuple) and token else token
        if isinstance(token, int) and 0 <= token < config.vocab_size:
            return torch.full((rows, 1), token, device=device)
    return torch.randint(config.vocab_size, (rows, 1), device=device, generator=generator)


def _write(
    model: Any,
    ids: Tensor,
    context: int,
    temperature: float,
    generator: torch.Generator,
    progress: Stage,
) -> Tensor:
    """Continue `ids` [rows, 1] to [rows, context]."""
    output = model(input_ids=ids, use_cache=True)
    argument = cache_argument(model)
    cache = getattr(output, argument, None)
    if cache is None:
        name = type(model).__name__
        raise CalibrationError(f"{name} keeps no key-value cache, {_CANNOT_WRITE}")
    reserve(cache, context)
    written = [ids]
    given = {argument: cache}
    progress.advance(ids.numel())
    while len(written) < context:
        choose = _first_token if len(written) == 1 else _next_token
        written.append(choose(output.logits[:, -1].float(), temperature, generator))
        progress.advance(ids.numel())
        if len(written) < context:
            output = model(input_ids=written[-1], use_cache=True, **given)
    return torch.cat(written, dim=1)


def cache_argument(model: Any) -> str:
    """What `model` calls its key-value cache: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _first_token(logits: Tensor, _temperature: float, generator: torch.Generator) -> Tensor:
    """One of the likeliest tokens, uniformly: float32 [rows, vocab] -> int64 [rows, 1]."""
    if logits.isnan().any():
        raise CalibrationError(
            "the model gives NaN where its next token should be: check its weights and dtype"
        )
    likely = logits.topk(min(_FIRST_CHOICES, logits.shape[1])).indices
    pick = torch.randint(
        likely.shape[1], (len(likely), 1), device=likely.device, generator=generator
    )
    return likely.gather(1, pick)


def _next_token(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A sampled token: float32 [rows, vocab] -> int64 [rows, 1].

    It inverts the distribution, first over blocks of the vocabulary, then inside one: one random
    number per row, where `torch.multinomial` draws one per vocabulary entry, which takes longer
    than the model.
    """
    size = logits.shape[1]
    weight = (logits if temperature == 1 else logits / temperature).softmax(-1)
    blocks = nn.functional.pad(weight, (0, -size % _BLOCK)).unflatten(1, (-1, _BLOCK))
    edges = blocks.sum(-1).double().cumsum(-1)
    point = torch.rand((len(edges), 1), dtype=edges.dtype, device=edges.device, generator=generator)
    point = point * edges[:, -1:]
    block = torch.searchsorted(edges, point, right=True).clamp_max_(edges.shape[1] - 1)
    inside = blocks.take_along_dim(block.unsqueeze(2), 1).squeeze(1).double().cumsum(-1)
    rest = point - edges.gather(1, block) + inside[:, -1:]
    found = torch.searchsorted(inside, rest, right=True).clamp_max_(_BLOCK - 1)
    return (block * _BLOCK + found).clamp_max_(size - 1)
