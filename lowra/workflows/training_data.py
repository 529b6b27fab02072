"""Training data: texts or conversations from files, the Hub or Python, as rows of token ids."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowra.compiler.errors import DataError
from lowra.compiler.progress import stage
from lowra.workflows.models import vocabulary_size
from lowra.workflows.training_sources import Conversation, Source, read_source

LONG = ("pack", "truncate")
"""What becomes of examples that are longer than the context."""

_AT_ONCE = 1000
"""Texts that go to the tokenizer together."""

Row = dict[str, list[int]]


@dataclass(frozen=True)
class TrainingData:
    """Rows of `input_ids` to train on, rows held out, and what was done to make them.

    Rows have 2 to `context` tokens. `facts` is plain JSON data: where the data came from, the
    counts of examples, rows and tokens, and what was cut or left out.
    """

    train: list[Row]
    held_out: list[Row]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def digest(self) -> str:
        """sha256 over all rows in order."""
        total = hashlib.sha256()
        for rows in (self.train, self.held_out):
            for row in rows:
                total.update(torch.tensor(row["input_ids"], dtype=torch.int64).numpy().tobytes())
                total.update(b"|")
            total.update(b"/")
        return total.hexdigest()


def training_data(
    source: Any, tokenizer: Any, model: nn.Module, *, text_field: str | None = None,
    context: int = 512, long: str = "pack", eval_source: Any = None, eval_share: float = 0.1,
    split: str = "train", seed: int = 0,
) -> TrainingData:  # fmt: skip
    """Rows of tokens for `model` out of `source` (see `read_source`).

    long "pack": all examples, an end-of-text token behind each, are joined and cut into rows of
    `context` tokens: nothing is lost but a last token that would be a row alone, and a row may hold
    several examples, which see each other.
    "truncate": a row per example, cut at `context`. `facts` counts what either costs.
    Held out are `eval_source`, or a share of the examples drawn with `seed` (of one plain text: its
    last rows). Raises DataError for data that is empty, has one example of which none could be held
    out, lacks the field, leaves nothing to train on or to hold out, or has ids that the model does
    not know.
    """
    _check_choices(model, context, long, eval_share)
    if tokenizer is None:
        raise DataError("training on text needs a tokenizer: pass tokenizer=...")
    found, others = _sources(source, eval_source, text_field, split)
    encoded = _encoded(found, tokenizer, model)
    if others is not None:
        pieces, kept = encoded, _encoded(others, tokenizer, model)
    elif found.stream:
        pieces, kept = encoded, []
    else:
        pieces, kept = _split(encoded, eval_share, seed, found)
    train, cut = _rows(pieces, context, long)
    held_out, cut_too = _rows(kept, context, long) if kept else ([], {})
    if others is None and found.stream:
        train, held_out = _split_rows(train, eval_share, found)
    _require_rows(train, held_out, found, others, eval_share)
    facts = {
        "source": found.name, "kind": found.kind, "field": found.field, "context": context,
        "long": long, "examples": len(encoded), "rows": len(train),
        "tokens": sum(len(row["input_ids"]) for row in train),
        "held_out": found.name if others is None else others.name,
        "held_out_rows": len(held_out),
        "held_out_tokens": sum(len(row["input_ids"]) for row in held_out),
        **{name: count + cut_too.get(name, 0) for name, count in cut.items()},
    }  # fmt: skip
    return TrainingData(train, held_out, facts)


def describe_cut(facts: dict[str, Any]) -> str:
    """A sentence on what became of long and short examples."""
    if facts["long"] == "pack":
        done = f"examples are packed: joined, and cut into rows of {facts['context']} tokens"
        if facts["lost_tokens"]:
            done += f", which leaves {facts['lost_tokens']} of the last tokens out"
    else:
        done = (
            f"{facts['truncated']} examples longer than {facts['context']} tokens are truncated, "
            f"which leaves {facts['lost_tokens']:,} tokens out"
        )
    short = facts["too_short"]
    return done + (f"; {short} of less than two tokens are left out" if short else "")


def check_rows(data: TrainingData, model: nn.Module) -> None:
    """Raise DataError unless `data`, made elsewhere, has rows that `model` can train on."""
    if not data.train:
        raise DataError("the training data has no row: TrainingData needs rows to train on")
    most = _positions(model) or math.inf
    for name, rows in (("train", data.train), ("held_out", data.held_out)):
        ids = [row["input_ids"] for row in rows]
        for number, one in enumerate(ids):
            if not 2 <= len(one) <= most:
                raise DataError(
                    f"row {number} of {name} has {len(one)} tokens: give rows of 2 to {most}"
                )
        _check_vocabulary(ids, model, "row", name)


def _sources(
    source: Any, eval_source: Any, text_field: str | None, split: str
) -> tuple[Source, Source | None]:
    found = read_source(source, text_field, split)
    others = None if eval_source is None else read_source(eval_source, text_field, split)
    if text_field is not None and found.field is None and (others is None or others.field is None):
        raise DataError(
            f"{found.name} is plain text and has no field {text_field!r}: leave the text field "
            "out, or give records"
        )
    return found, others


def _require_rows(
    train: list[Row], held_out: list[Row], found: Source, others: Source | None, share: float
) -> None:
    """Raise DataError without a row to train on, or to evaluate on where that is wanted."""
    none = "has no example of two tokens or more"
    if not train:
        raise DataError(f"{found.name} {none} to train on")
    if held_out:
        return
    if others is not None:
        raise DataError(f"{others.name} {none} to evaluate on")
    if share:
        raise DataError(
            f"what is held out of {found.name} {none}: give more, another file for the "
            "evaluation, or eval_share=0"
        )


def _check_choices(model: nn.Module, context: int, long: str, share: float) -> None:
    if long not in LONG:
        raise DataError(f"long={long!r} is unknown: choose {' or '.join(LONG)}")
    if not 0 <= share < 1:
        raise DataError(f"eval_share={share!r} must be from 0 to below 1")
    positions = _positions(model)
    if context < 2 or (positions is not None and context > positions):
        raise DataError(
            f"context={context} does not fit a model of {positions} positions: use 2 to {positions}"
        )


def _positions(model: nn.Module) -> int | None:
    """The most tokens that a row of `model` may have, or None if its config sets no limit."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _encoded(found: Source, tokenizer: Any, model: nn.Module) -> list[list[int]]:
    """Token ids of every example, an end-of-text token behind each text."""
    if not found.examples:
        raise DataError(f"{found.name} is empty: give text to train on")
    end = getattr(tokenizer, "eos_token_id", None)
    ids: list[list[int]] = []
    with stage("tokens", len(found.examples)) as bar:
        for start in range(0, len(found.examples), _AT_ONCE):
            part = found.examples[start : start + _AT_ONCE]
            if found.kind == "chat":
                ids += [_chat_ids(one, tokenizer, start + i) for i, one in enumerate(part)]
            else:
                ids += [_ended(one, end) for one in _text_ids(part, tokenizer)]
            bar.advance(len(part))
    _check_vocabulary(ids, model, "example", found.name)
    return ids


def _text_ids(texts: Sequence[Any], tokenizer: Any) -> list[list[int]]:
    options = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    return [list(ids) for ids in tokenizer(list(texts), **options)["input_ids"]]


def _chat_ids(messages: Conversation, tokenizer: Any, number: int) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "the data holds conversations, and the tokenizer has no chat template: "
            "use the tokenizer of an instruct model, or a text field"
        )
    try:
        found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    except Exception as error:  # whatever a template raises for roles that it does not know
        raise DataError(f"conversation {number} does not fit the template: {error}") from error
    return list(found["input_ids"])


def _ended(ids: list[int], end: Any) -> list[int]:
    return ids if not isinstance(end, int) or ids[-1:] == [end] else [*ids, end]


def _check_vocabulary(ids: list[list[int]], model: nn.Module, each: str, name: str) -> None:
    known = vocabulary_size(model)
    if known is None:
        return
    for number, one in enumerate(ids):
        if one and not 0 <= min(one) <= max(one) < known:
            odd = max(one) if max(one) >= known else min(one)
            raise DataError(
                f"{each} {number} of {name} holds the token id {odd}, outside the model's "
                f"0..{known - 1}: use the tokenizer that belongs to this model"
            )


def _split(
    ids: list[list[int]], share: float, seed: int, found: Source
) -> tuple[list[list[int]], list[list[int]]]:
    """Examples to train on, in their order, and those held out."""
    if not share:
        return ids, []
    if len(ids) < 2:
        raise DataError(
            f"{found.name} has one example, and none is left to hold out: give more, another file "
            "for the evaluation, or eval_share=0"
        )
    count = min(len(ids) - 1, max(1, round(share * len(ids))))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    held = set(order[:count].tolist())
    return (
        [one for i, one in enumerate(ids) if i not in held],
        [one for i, one in enumerate(ids) if i in held],
    )


def _split_rows(rows: list[Row], share: float, found: Source) -> tuple[list[Row], list[Row]]:
    """The last share of the rows of one text is held out."""
    if not share:
        return rows, []
    if len(rows) < 2:
        raise DataError(
            f"{found.name} fills one row, and none is left to hold out: give more text, a shorter "
            "context, another file for the evaluation, or eval_share=0"
        )
    count = min(len(rows) - 1, max(1, round(share * len(rows))))
    return rows[:-count], rows[-count:]


def _rows(pieces: Iterable[list[int]], context: int, long: str) -> tuple[list[Row], dict[str, int]]:
    """Rows of 2 to `context` tokens, and how much was cut."""
    pieces, packed = list(pieces), long == "pack"
    if packed:
        joined = [token for one in pieces for token in one]
        cut = [joined[start : start + context] for start in range(0, len(joined), context)]
    else:
        cut = [one[:context] for one in pieces]
    short = [one for one in cut if len(one) < 2]
    over = [] if packed else [len(one) - context for one in pieces if len(one) > context]
    counts = {
        "truncated": len(over),
        "lost_tokens": sum(map(len, short)) if packed else sum(over),
        "too_short": 0 if packed else len(short),
    }
    return [{"input_ids": one} for one in cut if len(one) > 1], counts
