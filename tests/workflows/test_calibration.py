"""Calibration tokens: what is accepted and what is refused."""

import pytest
import torch

from lowra.compiler.errors import CalibrationError
from lowra.workflows.calibration import as_token_batches

VOCAB = 101


class LetterTokenizer:
    """One token per character."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) % VOCAB for letter in text]}


def batches(calibration, tokenizer=None, tokens=64, context=8):
    return as_token_batches(calibration, tokenizer, VOCAB, tokens=tokens, context=context)


def test_texts_are_joined_by_blank_lines_and_cut():
    ids = batches(["ab" * 10, "cd" * 10], LetterTokenizer(), tokens=1000, context=8)
    stream = LetterTokenizer()("ab" * 10 + "\n\n" + "cd" * 10)["input_ids"]
    assert ids.dtype == torch.int64
    assert ids.flatten().tolist() == stream[:40]
    assert ids.shape == (5, 8)


def test_at_most_the_asked_tokens_are_used():
    assert batches(["a" * 500], LetterTokenizer(), tokens=30, context=8).shape == (3, 8)
    assert batches(torch.ones(9, 10, dtype=torch.int32), tokens=30).shape == (3, 10)
    assert batches(torch.ones(9, 10, dtype=torch.int64), tokens=4).shape == (1, 4)


def test_a_file_equals_its_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("hello world " * 9, encoding="utf-8")
    from_text = batches(["hello world " * 9], LetterTokenizer())
    assert torch.equal(batches(file, LetterTokenizer()), from_text)
    assert torch.equal(batches(str(file), LetterTokenizer()), from_text)


def test_a_short_text_makes_one_short_window():
    assert batches(["a" * 20], LetterTokenizer(), context=32).shape == (1, 20)


def test_iterables_of_one_length_are_stacked():
    rows = [torch.full((8,), i) for i in range(3)]
    assert torch.equal(batches(rows), torch.stack(rows))
    assert torch.equal(batches({"input_ids": row} for row in rows), torch.stack(rows))
    assert torch.equal(batches([{"input_ids": torch.stack(rows)}]), torch.stack(rows))
    assert torch.equal(batches([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]]))


def test_endless_data_is_read_only_as_far_as_needed():
    def endless():
        while True:
            yield {"input_ids": torch.ones(2, 8, dtype=torch.int64)}

    assert batches(endless()).shape == (8, 8)


def test_padding_is_dropped_and_the_rest_joined():
    item = {
        "input_ids": torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]]),
    }
    assert batches([item], context=3).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "no calibration data"),
        ([], "empty"),
        (3, "is a int"),
        ("no-such.txt", "cannot read"),
        ("a sentence, no path", "not the path of a .txt"),
        (["a" * 15], "15 tokens"),
        (["a" * 40, 7], "item 1 is a int"),
        (torch.zeros(2, 8), "float32"),
        (torch.zeros(2, 8, dtype=torch.bool), "bool"),
        (torch.zeros(8, dtype=torch.int64), r"shape \[8\]"),
        (torch.zeros(0, 8, dtype=torch.int64), r"shape \[0, 8\]"),
        (torch.tensor([[1, 2], [3, 101]]), r"id 101 at \[1, 1\].*0\.\.100"),
        (torch.tensor([[1, -5], [3, 101]]), r"id -5 at \[0, 1\]"),
        ([torch.tensor([1]), torch.tensor([999])], r"item 1 holds the id 999"),
        ([{"text": "a"}], 'no "input_ids"'),
        ([object()], "item 0 is a object"),
        ([torch.zeros(2, 2, 2, dtype=torch.int64)], "item 0 has shape"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "nothing but padding"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "a mask"),
    ],
)
def test_bad_data_is_refused(calibration, message):
    with pytest.raises(CalibrationError, match=message):
        batches(calibration, LetterTokenizer(), context=32)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(CalibrationError, match="pass tokenizer="):
        batches(["some text"])


def test_a_foreign_tokenizer_is_refused():
    with pytest.raises(CalibrationError, match="tokenizer that belongs"):
        as_token_batches(["z" * 40], LetterTokenizer(), 5, tokens=32, context=8)


def test_sizes_must_be_positive():
    with pytest.raises(CalibrationError, match="tokens=0"):
        batches(["a"], LetterTokenizer(), tokens=0)
