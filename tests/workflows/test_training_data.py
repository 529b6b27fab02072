"""Training data: where it comes from, what it is cut to, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowra.compiler.errors import DataError
from lowra.workflows.training_data import TrainingData, describe_cut, training_data
from lowra.workflows.training_sources import read_source
from tests.cli.conftest import letters
from tests.models import tiny_llama

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def data(source: Any, **options: Any) -> TrainingData:
    tokenizer = options.pop("tokenizer", letters())
    return training_data(source, tokenizer, tiny_llama(layers=1), **({"context": 16} | options))


def texts(made: TrainingData) -> str:
    rows = [*made.train, *made.held_out]
    return "".join(chr(i) for row in rows for i in row["input_ids"])


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_records_of_a_jsonl_file_are_packed_and_nothing_is_lost(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [{"text": f"example {i:02}."} for i in range(20)])
    made = data(file, eval_share=0.2)
    assert made.facts["examples"] == 20
    assert {len(row["input_ids"]) for row in made.train[:-1]} == {16}
    assert sorted(texts(made).split("example ")[1:]) == [f"{i:02}." for i in range(20)]
    assert "packed" in describe_cut(made.facts)


def test_an_example_is_trained_on_or_held_out_and_the_seed_says_which() -> None:
    source = [f"<{i:02}>" for i in range(30)]
    one, again, other = (data(source, seed=seed) for seed in (1, 1, 2))
    assert one.digest() == again.digest() != other.digest()
    assert one.facts["held_out_tokens"] == 3 * 4
    assert sorted(texts(one).split("<")[1:]) == [f"{i:02}>" for i in range(30)]


def test_an_end_of_text_token_stands_behind_every_text() -> None:
    tokenizer = letters()
    tokenizer.eos_token = "|"
    made = data(["ab", "cd"], tokenizer=tokenizer, eval_share=0)
    assert texts(made) == "ab|cd|"


def test_truncated_examples_are_counted_and_so_is_what_is_lost() -> None:
    made = data(["a" * 20, "b" * 10, "c"], long="truncate", eval_share=0)
    assert [len(row["input_ids"]) for row in made.train] == [16, 10]
    assert (made.facts["truncated"], made.facts["lost_tokens"]) == (1, 4)
    assert made.facts["too_short"] == 1
    said = describe_cut(made.facts)
    assert "1 examples longer than 16 tokens are truncated" in said and "1 of less than two" in said


def test_of_a_plain_text_the_last_rows_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("".join(chr(97 + i % 26) for i in range(160)))
    made = data(tmp_path / "d.txt", eval_share=0.2)
    assert (len(made.train), len(made.held_out)) == (8, 2)
    assert texts(made) == (tmp_path / "d.txt").read_text()


def test_conversations_go_through_the_tokenizers_template(tmp_path: Path) -> None:
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    file = write(tmp_path / "d.jsonl", [{"messages": CHAT}] * 3)
    made = data(file, tokenizer=tokenizer, eval_share=0)
    assert texts(made) == "<user>hi<assistant>ho" * 3
    assert made.facts["kind"] == "chat"


def test_a_data_set_and_a_table_are_read_like_records(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"body": "one."}, {"body": "two."}]
    set_ = datasets.Dataset.from_list(rows)
    set_.to_parquet(str(tmp_path / "d.parquet"))
    set_.save_to_disk(str(tmp_path / "folder"))
    expected = [row["body"] for row in rows]
    for source in (set_, tmp_path / "d.parquet", tmp_path / "folder"):
        assert read_source(source, "body").examples == expected


def test_a_missing_field_is_an_error_that_names_the_fields_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [{"content": "a", "id": 1}])
    with pytest.raises(DataError, match=r"no field 'messages' or 'text'; it has 'content', 'id'"):
        data(file)
    with pytest.raises(DataError, match=r"no field 'contents'; .*nearest: content"):
        data(file, text_field="contents")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], "is empty"),
        (["lonely"], "has one example, and none is left to hold out"),
        ([{"text": "a"}, {"txt": "b"}], "example 1 of the data has no field 'text', only 'txt'"),
        ([{"text": "a"}, {"text": None}], "example 1 of the data is a NoneType and no text"),
        ([{"messages": CHAT}, {"messages": [{"role": "user"}]}], "example 1 .* no conversation"),
        ([{"messages": CHAT}, {"messages": CHAT}], "the tokenizer has no chat template"),
        ([7], "holds a int"),
        (7, "training data is a int"),
        ({"train": ["a"], "test": ["b"]}, "has the parts train, test"),
        ("/nowhere/d.jsonl", "no training data at"),
        (["a", "b"], "no example of two tokens"),
        ([{"text": None}], "example 0 of the data is a NoneType and no text"),
        ([{"messages": None}], "example 0 of the data is no conversation"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(source: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        data(
            source,
            long="truncate",
        )


def test_data_to_evaluate_on_without_a_row_are_refused() -> None:
    with pytest.raises(DataError, match="the data has no example of two tokens or more to eval"):
        data(["ab", "cd"], eval_source=["a"])
    with pytest.raises(DataError, match="held out of the data has no example of two tokens"):
        data(["ab", "c"], long="truncate", seed=1)  # which draws the second


def test_a_text_field_that_nothing_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("a plain text of some length, and more of it")
    for source in (tmp_path / "d.txt", ["a text", "another"]):
        with pytest.raises(DataError, match=r"is plain text and has no field 'body': leave"):
            data(source, text_field="body")
    made = data([{"body": "ab"}], text_field="body", eval_source=tmp_path / "d.txt")
    assert (made.facts["field"], len(made.held_out)) == ("body", 3)


def test_a_last_token_that_fills_no_row_is_counted() -> None:
    made = data(["a" * 17], eval_source=["b" * 33], long="pack")
    assert made.facts["lost_tokens"] == 2
    assert "leaves 2 of the last tokens out" in describe_cut(made.facts)
    assert "out" not in describe_cut(data(["a" * 18], eval_share=0).facts)


def test_a_line_of_jsonl_ends_at_a_newline_alone(tmp_path: Path) -> None:
    records = [{"text": f"one{mark}two"} for mark in "\u2028\u2029\x85"]
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "d.jsonl").write_bytes(lines.encode())
    expected = [record["text"] for record in records]
    assert read_source(tmp_path / "d.jsonl", None).examples == expected


def test_broken_lines_and_empty_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2 of .* is no JSON"):
        data(tmp_path / "d.jsonl")
    for name in ("e.jsonl", "e.txt"):
        (tmp_path / name).write_text(" \n")
        with pytest.raises(DataError, match=f"{name}.* is empty"):
            data(tmp_path / name)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="give a UTF-8 text file"):
        data(tmp_path / "bytes.txt")


def test_a_tokenizer_that_does_not_fit_is_refused_before_training() -> None:
    class Foreign:
        def __call__(self, batch: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[5, 6], [7, 500]]}

    with pytest.raises(DataError, match=r"example 1 .* token id 500, outside the model's 0..127"):
        data(["a", "b"], tokenizer=Foreign())
    with pytest.raises(DataError, match="needs a tokenizer"):
        data(["a", "b"], tokenizer=None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": 129}, "context=129 does not fit a model of 128 positions"),
        ({"context": 1}, "context=1 does not fit"),
        ({"long": "wrap"}, "long='wrap' is unknown"),
        ({"eval_share": 1.0}, "eval_share=1.0"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        data(["ab", "cd"], **options)
