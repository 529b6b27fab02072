"""Calibration data of any accepted kind as token ids, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowra.compiler.errors import CalibrationError
from lowra.workflows.evaluate import check_token_ids, tokenise

_SHORTEST_WINDOW = 16
_WAY_OUT = "give a list of texts, the path of a .txt file, or an int64 tensor [windows, context]"


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
