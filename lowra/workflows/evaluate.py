"""What compression costs: perplexity, the divergence from the original, and a look at the text."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowra.compiler.errors import CalibrationError, LowraError
from lowra.compiler.half_products import half_products
from lowra.compiler.progress import stage
from lowra.workflows.models import inference, vocabulary_size

_CHUNK = 256
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate`.

    `perplexity` is exp of the mean negative log likelihood; `kl` the mean KL(reference || model)
    in nats per position, or None without a reference; `tokens` the number of positions scored,
    windows x (context - 1); `seconds` wall time.
    """

    perplexity: float
    kl: float | None
    windows: int
    context: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name, for JSON."""
        return asdict(self)


def evaluate(
    model: nn.Module, tokens: Tensor, *, reference: nn.Module | None = None, batch: int = 4
) -> Evaluation:
    """Score `model` on `tokens`, int64 [windows, context], beside `reference` if one is given.

    Each window's positions 0..context-2 predict their next token. `batch` windows go through the
    model at a time; their logits, [batch, context, vocab] of the model's dtype for each of the two
    models, are the peak of memory. They are compared in float32, 256 positions at a time. Training
    flags stay as they were.

    Raises `LowraError` for a model that is no causal language model, for two vocabularies of
    different sizes, and (as `CalibrationError`) for tokens of a wrong shape or range.
    """
    require_language_model(model)
    if reference is not None:
        require_language_model(reference)
    tokens = check_token_ids(tokens, vocabulary_size(model), "evaluation data")
    count, context = tokens.shape
    if context < 2 or batch < 1:
        raise LowraError(
            f"evaluation needs windows of 2 tokens or more and a positive batch, got "
            f"{list(tokens.shape)} and {batch}: cut the text into longer windows"
        )
    start = time.perf_counter()
    nll = divergence = 0.0
    with (
        inference(model), _inference_if(reference), half_products(model),
        stage("Evaluate", count) as progress,
    ):  # fmt: skip
        for ids in tokens.split(batch):
            logits = _logits(model, ids)
            expected = None if reference is None else _logits(reference, ids)
            _require_same_vocabulary(logits, expected)
            for row, piece in enumerate(ids):
                other = None if expected is None else expected[row]
                row_nll, row_divergence = _score(logits[row], other, piece)
                nll, divergence = nll + row_nll, divergence + row_divergence
                progress.advance()
            del logits, expected
    scored = count * (context - 1)
    return Evaluation(
        perplexity=_exp(nll / scored),
        kl=None if reference is None else divergence / scored,
        windows=count,
        context=context,
        tokens=scored,
        seconds=time.perf_counter() - start,
    )


def windows(text: str, tokenizer: Any, *, count: int, context: int) -> Tensor:
    """The first `count` non-overlapping windows of `text`: int64 [count, context].

    Raises `LowraError` when the text has fewer tokens, saying how many there are.
    """
    if count < 1 or context < 1:
        raise LowraError(f"cannot cut {count} windows of {context} tokens: give positive numbers")
    ids = tokenise(text, tokenizer, limit=count * context)
    if len(ids) < count * context:
        raise LowraError(
            f"the text has {len(ids)} tokens, {count} windows of {context} need "
            f"{count * context}: ask for {len(ids) // context} windows, or give more text"
        )
    return torch.tensor(ids, dtype=torch.int64).view(count, context)


def check_token_ids(ids: Tensor, vocab_size: int | None, what: str = "calibration data") -> Tensor:
    """`ids` as int64 [windows, context] on the CPU, or `CalibrationError` naming what is wrong.

    Integer dtype, two dimensions, not empty, and every id within 0..vocab_size-1 are required;
    with `vocab_size` None only the sign is checked. `what` names the data in the message.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"{what} has dtype {ids.dtype}: give token ids, as int64")
    if ids.dim() != 2 or ids.numel() == 0:
        raise CalibrationError(
            f"{what} has shape {list(ids.shape)}: give [windows, context], at least one of each"
        )
    ids = ids.detach().to("cpu", torch.int64)
    bad = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        upper = "" if vocab_size is None else str(vocab_size - 1)
        raise CalibrationError(
            f"{what} holds the id {ids[row, column].item()} at [{row}, {column}], outside the "
            f"model's 0..{upper}: use the tokenizer that belongs to this model"
        )
    return ids


def tokenise(text: str, tokenizer: Any | None, limit: int | None = None) -> list[int]:
    """The token ids of `text`, at most `limit` of them (None: all).

    Raises `CalibrationError` without a tokenizer.
    """
    if tokenizer is None:
        raise CalibrationError("text needs a tokenizer to become tokens: pass tokenizer=...")
    options = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    if limit is None:
        return list(tokenizer(text, **options)["input_ids"])
    beginning = text[: limit * _CHARACTERS_PER_TOKEN]
    ids = list(tokenizer(beginning, **options)["input_ids"])
    if len(ids) < limit and len(beginning) < len(text):
        ids = list(tokenizer(text, **options)["input_ids"])
    return ids[:limit]


def held_out_english(max_chars: int = 400_000) -> str:
    """English text that every machine has: Python's own language reference, markup removed.

    The same Python version gives the same text, at most `max_chars` characters of it.
    Raises `LowraError` where Python came without its help pages.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LowraError(
            "this Python came without its help pages (pydoc_data): pass a text of your own"
        ) from error
    pages = (_plain(topics[title]) for title in sorted(topics))
    return "\n\n".join(page for page in pages if page)[:max_chars]


def sample(model: Any, tokenizer: Any, prompt: str, *, tokens: int, greedy: bool = True) -> str:
    """What `model` writes after `prompt`, at most `tokens` tokens, without the prompt.

    With `greedy` False it is drawn with torch's global random state.
    Raises `LowraError` for a model that cannot generate.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise LowraError(f"{type(model).__name__} cannot generate text: use a language model")
    device = next(model.parameters()).device
    ids = torch.tensor([tokenise(prompt, tokenizer)], dtype=torch.int64, device=device)
    with inference(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=not greedy,
            pad_token_id=_padding(model),
        )
    prompt_length = 0 if model.config.is_encoder_decoder else ids.shape[1]
    return tokenizer.decode(output[0, prompt_length:].tolist(), skip_special_tokens=True)


def _padding(model: Any) -> int | None:
    config = model.generation_config
    for token in (config.pad_token_id, config.eos_token_id):
        if token is not None:
            return token[0] if isinstance(token, list) else token
    return None


def require_language_model(model: nn.Module) -> None:
    """Raise LowraError for a model that predicts no next tokens."""
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None:
        return
    if can_generate() and not getattr(config, "is_encoder_decoder", False):
        return
    raise LowraError(_not_a_language_model(model))


def _not_a_language_model(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} does not predict next tokens, and perplexity needs a causal "
        "language model: compare its outputs with the original's instead"
    )


def _inference_if(model: nn.Module | None) -> AbstractContextManager[None]:
    return nullcontext() if model is None else inference(model)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [batch, context, vocab] of `model` for `ids` [batch, context]."""
    parameter = next(model.parameters(), None)
    ids = ids if parameter is None else ids.to(parameter.device)
    options = {"use_cache": False} if hasattr(model, "can_generate") else {}
    output = model(ids, **options)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise LowraError(_not_a_language_model(model))
    if logits.shape[2] <= int(ids.max()):
        raise LowraError(_not_a_language_model(model))
    return logits


def _require_same_vocabulary(logits: Tensor, expected: Tensor | None) -> None:
    if expected is None or expected.shape == logits.shape:
        return
    raise LowraError(
        f"the model has {logits.shape[2]} logits and the reference {expected.shape[2]}: "
        "give the model that was compressed as the reference"
    )


def _score(logits: Tensor, expected: Tensor | None, ids: Tensor) -> tuple[float, float]:
    """Summed negative log likelihood and divergence of one window, in nats.

    `logits` and `expected` are [context, vocab], `ids` int64 [context].
    """
    nll = divergence = 0.0
    for begin, end in _chunks(len(ids) - 1):
        found = logits[begin:end].float().log_softmax(-1)
        labels = ids[begin + 1 : end + 1].to(found.device)
        nll -= found.gather(1, labels[:, None]).double().sum().item()
        if expected is not None:
            divergence += _divergence(expected[begin:end].to(found.device), found)
    return nll, divergence


def _chunks(length: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, length, _CHUNK):
        yield begin, min(begin + _CHUNK, length)


def _divergence(expected: Tensor, found: Tensor) -> float:
    """Summed KL of `expected` logits from `found` log-probabilities; overwrites `found`."""
    wanted = expected.float().log_softmax(-1)
    terms = torch.sub(wanted, found, out=found).mul_(wanted.exp())
    impossible = wanted.isneginf()
    if impossible.any():
        terms.masked_fill_(impossible, 0.0)
    return terms.sum(-1, dtype=torch.float64).sum().item()


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _plain(page: str) -> str:
    """One help page as prose: roles, emphasis, rules and indentation removed."""
    page = re.sub(r":\w+(?::\w+)?:`~?([^`<]*?)(?: <[^`]*>)?`", r"\1", page)
    page = re.sub(r"^[=*~^\-+\"]{3,}\s*$", "", page, flags=re.MULTILINE)
    page = re.sub(r"^\s*\.\. .*$", "", page, flags=re.MULTILINE)
    page = re.sub(r"\*\*([^*\n]+)\*\*|\*([^*\n]+)\*", r"\1\2", page)
    page = re.sub(r"^[ \t]+", "", page.replace("`", ""), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", page).strip()
