"""Where training data comes from: JSONL, plain text, tables, the Hub, lists and data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lowra.compiler.errors import DataError, nearest
from lowra.workflows.models import looks_like_path

CHAT_FIELD, TEXT_FIELD = "messages", "text"
"""The fields looked for where none is named, in this order."""

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """Examples, all of one `kind`: "text" (strings) or "chat" (lists of messages).

    `stream` is set for one plain text, which has no examples of its own. `field` is where records
    had the example, or None.
    """

    name: str
    kind: str
    field: str | None
    examples: list[Any]
    stream: bool = False


def read_source(source: Any, text_field: str | None, split: str = "train") -> Source:
    """The examples of `source`.

    A path: .jsonl (or a .json list) of records, .csv or .parquet (read by `datasets`), any other
    file as one plain text. A name that is no path: a data set of the Hub, `owner/name` or
    `owner/name:config`, its part `split`. Else texts, records, or a `datasets.Dataset`.
    A record's example is its `text_field`, by default "messages" or "text": a string, or messages
    with `role` and `content`. Raises DataError.
    """
    if isinstance(source, (str, Path)):
        return _read_named(str(source), text_field, split)
    if isinstance(source, Mapping) and hasattr(source, "keys"):
        raise DataError(
            f"the data set has the parts {', '.join(map(str, source))}: give one of them"
        )
    if not isinstance(source, Iterable):
        raise DataError(
            f"training data is a {type(source).__name__}: give a path, texts or records"
        )
    return _from_records("the data", source, text_field)


def _read_named(name: str, text_field: str | None, split: str) -> Source:
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix in JSON_LINES:
            return _from_records(name, _json_records(path), text_field)
        if path.suffix in TABLES:
            return _from_records(name, _table(path), text_field)
        text = _read(path)
        examples = [text] if text.strip() else []
        return Source(name, "text", None, examples, stream=True)
    if path.is_dir() or not looks_like_path(name):
        return _from_records(name, _data_set(name, split), text_field)
    raise DataError(f"no training data at {name!r}: give a file, or a data set of the Hub")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r} ({error}): give a UTF-8 text file") from error


def _json_records(path: Path) -> Iterator[Any]:
    text = _read(path)
    if text.lstrip().startswith("["):
        try:
            yield from json.loads(text)
        except ValueError as error:
            raise DataError(f"{str(path)!r} is no JSON list ({error})") from error
        return
    for number, line in enumerate(text.split("\n"), 1):  # a JSON string may hold U+2028, U+0085
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} of {str(path)!r} is no JSON ({error})") from error


def require_datasets() -> Any:
    """The `datasets` package. Raises DataError where it is not installed."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "tables and data sets of the Hub are read by the package datasets: "
            "pip install 'lowra[train]'"
        ) from error
    return datasets


def _table(path: Path) -> Iterable[Any]:
    datasets = require_datasets()
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    kind = TABLES[path.suffix]
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except Exception as error:  # whatever a reader raises for a broken table
        raise DataError(f"cannot read {str(path)!r} as {kind}: {_first_line(error)}") from error


def _data_set(name: str, split: str) -> Iterable[Any]:
    """One part of a data set of the Hub, or of a folder."""
    datasets = require_datasets()
    owner, _, config = name.partition(":")
    try:
        if Path(name, "dataset_info.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(owner, config or None, split=split)
    except Exception as error:  # network, spelling, configs, parts: all in the message
        raise DataError(
            f"cannot load the data set {name!r}, part {split!r}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")


def _from_records(name: str, records: Iterable[Any], text_field: str | None) -> Source:
    records = iter(records)
    first = next(records, None)
    if first is None:
        raise DataError(f"{name} is empty: give text to train on")
    records = chain([first], records)
    if isinstance(first, str):
        return Source(name, "text", None, [_text(name, i, t) for i, t in enumerate(records)])
    if not isinstance(first, Mapping):
        raise DataError(
            f"{name} holds a {type(first).__name__}: give texts, or records with fields"
        )
    field = _field(name, first, text_field)
    values = [_value(name, i, record, field) for i, record in enumerate(records)]
    kind = _kind(field, values[0])
    check = _text if kind == "text" else _conversation
    return Source(name, kind, field, [check(name, i, value) for i, value in enumerate(values)])


def _field(name: str, record: Mapping[str, Any], asked: str | None) -> str:
    """The field that holds the example; `asked`, or one of the usual."""
    fields = [str(key) for key in record]
    for field in (CHAT_FIELD, TEXT_FIELD) if asked is None else (asked,):
        if field in record:
            return field
    wanted = f"{CHAT_FIELD!r} or {TEXT_FIELD!r}" if asked is None else repr(asked)
    raise DataError(
        f"{name} has no field {wanted}; it has {', '.join(map(repr, fields))}. "
        f"Name one as the text field ({nearest(asked or TEXT_FIELD, fields)})"
    )


def _value(name: str, number: int, record: Any, field: str) -> Any:
    if not isinstance(record, Mapping) or field not in record:
        has = ", ".join(map(repr, record)) if isinstance(record, Mapping) else repr(record)[:40]
        raise DataError(f"example {number} of {name} has no field {field!r}, only {has}")
    return record[field]


def _kind(field: str, value: Any) -> str:
    """What the examples are, judged by the first, and by the field where that is neither."""
    if isinstance(value, str):
        return "text"
    return "chat" if field == CHAT_FIELD or isinstance(value, Sequence) else "text"


def _text(name: str, number: int, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"example {number} of {name} is a {type(value).__name__} and no text")
    return value


def _conversation(name: str, number: int, value: Any) -> Conversation:
    good = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    if not good or not all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in value):
        raise DataError(
            f"example {number} of {name} is no conversation: give messages, each with role and "
            "content"
        )
    return value
