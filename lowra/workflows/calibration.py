"""Calibration tokens: checked when they are given, written by the model when they are not."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowra.compiler.errors import CalibrationError
from lowra.compiler.progress import Stage, stage
from lowra.workflows.decode_attention import decode_attention
from lowra.workflows.evaluate import check_token_ids, tokenise
from lowra.workflows.models import inference

_SHORTEST_WINDOW = 16
_FIRST_CHOICES = 512
_BLOCK = 256
_WAY_OUT = "give a list of texts, the path of a .txt file, or an int64 tensor [windows, context]"
_CANNOT_WRITE = "and cannot write its own calibration text: pass calibration=..."


def as_token_batches(
    calibration: str | Path | Tensor | Iterable[Any] | None,
    tokenizer: Any | None,
    vocab_size: int,
    *,
    tokens: int,
    context: int,
) -> Tensor:
    """Calibration data of any accepted kind as token ids: int64 [windows, context] on the CPU.

    Accepted are a list of texts or the path of a `.txt` file (these need `tokenizer`; they are
    joined by blank lines and cut into windows), an integer tensor [windows, length] (its own
    length is kept), or an iterable of such tensors, of id lists, or of mappings with "input_ids"
    (stacked when all are of one length, else joined without padding and cut into windows).
    At most `tokens` tokens are used. Data shorter than one window, but of 16 tokens or more, makes
    a single shorter window.

    Raises `CalibrationError` for data that is missing, empty, too short, of the wrong shape or
    type, or that holds ids outside 0..vocab_size-1.
    """
    if tokens < 1 or context < 1:
        raise CalibrationError(
            f"tokens={tokens} and context={context} must be positive: give the numbers of tokens "
            "to use, and of tokens per window"
        )
    if calibration is None:
        raise _refusal("there is no calibration data")
    if isinstance(calibration, Tensor):
        return _limit(check_token_ids(calibration, vocab_size), tokens)
    if isinstance(calibration, str | Path):
        return _from_texts([_read_text(calibration)], tokenizer, vocab_size, tokens, context)
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    return _from_items(calibration, tokenizer, vocab_size, tokens, context)


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
        _own_random_state(device, seed) as generator,
        stage("Write calibration text", count * context) as progress,
    ):
        parts = []
        for done in range(0, count, batch):
            starts = _starts(model, min(batch, count - done), device, generator)
            parts.append(_write(model, starts, context, temperature, generator, progress))
    return torch.cat(parts).cpu()


def _refusal(problem: str) -> CalibrationError:
    return CalibrationError(f"{problem}: {_WAY_OUT}")


def _read_text(path: str | Path) -> str:
    file = Path(path).expanduser()
    if file.suffix != ".txt":
        raise _refusal(f"calibration {str(path)[:80]!r} is not the path of a .txt file")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"cannot read the calibration file {str(path)!r} ({error}): give a UTF-8 text file"
        ) from error


def _from_items(
    items: Any, tokenizer: Any | None, vocab_size: int, tokens: int, context: int
) -> Tensor:
    if not isinstance(items, Iterable):
        raise _refusal(f"calibration is a {type(items).__name__}")
    items = iter(items)
    first = next(items, None)
    if first is None:
        raise _refusal("calibration data is empty")
    items = chain([first], items)
    if isinstance(first, str):
        return _from_texts(_texts(items), tokenizer, vocab_size, tokens, context)
    rows = _rows(items, vocab_size, tokens)
    if len({len(row) for row in rows}) == 1:
        return _limit(torch.stack(rows), tokens)
    return _cut(torch.cat(rows), tokens, context)


def _texts(items: Iterable[Any]) -> Iterator[str]:
    for index, text in enumerate(items):
        if not isinstance(text, str):
            raise _refusal(f"calibration item {index} is a {type(text).__name__} among texts")
        yield text


def _from_texts(
    texts: Iterable[str], tokenizer: Any | None, vocab_size: int, tokens: int, context: int
) -> Tensor:
    ids = tokenise("\n\n".join(texts), tokenizer, limit=tokens)
    return check_token_ids(_cut(torch.tensor(ids, dtype=torch.int64), tokens, context), vocab_size)


def _rows(items: Iterable[Any], vocab_size: int, tokens: int) -> list[Tensor]:
    """Rows of ids, each [length] without padding, until there are `tokens` tokens."""
    rows: list[Tensor] = []
    have = 0
    for index, item in enumerate(items):
        what = f"calibration item {index}"
        ids, mask = _ids_and_mask(item, what)
        ids = check_token_ids(ids, vocab_size, what)
        if mask.shape != ids.shape:
            raise _refusal(f"{what} has ids {list(ids.shape)} and a mask {list(mask.shape)}")
        kept = [row[keep] for row, keep in zip(ids, mask, strict=True) if keep.any()]
        rows += kept
        have += sum(len(row) for row in kept)
        if have >= tokens:
            break
    if not rows:
        raise _refusal("calibration data holds nothing but padding")
    return rows


def _ids_and_mask(item: Any, what: str) -> tuple[Tensor, Tensor]:
    """The ids [rows, length] of one item, and bool [rows, length], True where it is no padding."""
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise _refusal(f'{what} has no "input_ids", only {sorted(map(str, item))}')
        item, mask = item["input_ids"], item.get("attention_mask")
    ids = _matrix(item, what)
    mask = torch.ones_like(ids) if mask is None else _matrix(mask, what)
    return ids, mask.to("cpu", torch.bool)


def _matrix(value: Any, what: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refusal(f"{what} is a {type(value).__name__} without ids") from error
    return tensor[None] if tensor.dim() == 1 else tensor


def _limit(ids: Tensor, tokens: int) -> Tensor:
    """The first windows of `ids` [windows, length] that hold at most `tokens` tokens."""
    length = min(ids.shape[1], tokens)
    return ids[: tokens // length, :length].contiguous()


def _cut(ids: Tensor, tokens: int, context: int) -> Tensor:
    """A stream of ids [n] as windows [n // context, context], or one shorter window."""
    usable = min(len(ids), tokens)
    if usable >= context:
        return ids[: usable // context * context].view(-1, context)
    if usable >= _SHORTEST_WINDOW:
        return ids[None, :usable]
    raise CalibrationError(
        f"calibration data has {usable} tokens, fewer than one window of {context} and than the "
        f"{_SHORTEST_WINDOW} that a shorter one needs: give more text"
    )


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
    written, cache = [ids], None
    progress.advance(ids.numel())
    while len(written) < context:
        output = model(input_ids=written[-1], past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            name = type(model).__name__
            raise CalibrationError(f"{name} keeps no key-value cache, {_CANNOT_WRITE}")
        choose = _first_token if len(written) == 1 else _next_token
        written.append(choose(output.logits[:, -1].float(), temperature, generator))
        progress.advance(ids.numel())
    return torch.cat(written, dim=1)


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
